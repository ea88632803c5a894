/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the core is made of. Every field has one owner: "worker" (the group's worker thread), "control" (any control thread under core->lock),
 * "constant" (set before anyone else sees it) or "shared" (atomic, by barrier.h). Control changes what a worker owns only by its commands.
 */
#ifndef TFD_MODEL_H
#define TFD_MODEL_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "../providers/provider.h"
#include "credits.h"
#include "frames.h"
#include "heap.h"
#include "pace.h"
#include "table.h"
#include "transferd/core.h"

#define TFD_NAME_SPACES 512u
#define TFD_WRS_PER_WORKER 4096u
#define TFD_CONTROL_ENDS 4096u /* ends of control jobs that are kept */
#define TFD_IMM_PAGE 1024u     /* immediates per page of the imm map */
#define TFD_NO_SLOT UINT32_MAX
#define TFD_KEY_BUCKETS 4096u /* a power of two */

struct tfd_list {
	struct tfd_list *next;
	struct tfd_list *prev;
};

/* A mapped and registered region. Owner: control makes and frees it; the worker reads it while it is in its table. */
struct tfd_region {
	uint64_t handle;
	struct tfd_session *session;
	uint8_t *base; /* of a device: what it is called in posts, never to be read here */
	uint64_t length;
	uint64_t map_bytes; /* length in whole pages of its file system */
	int fd; /* own duplicate: tells after an error whether the file still has its pages; of a device: -1 */
	bool device; /* constant: not mapped here; only rails with an mr reach it */
	uint64_t file_end;
	bool writable;
	uint32_t broken; /* shared; set by the SIGBUS guard */
	bool broken_told; /* worker */
	uint32_t jobs; /* worker; jobs in flight that read it */
	int guard; /* index in the guard's table */
	uint32_t rail_count;
	struct tfd_mr *mrs[TFD_MAX_RAILS];
	struct tfd_region_key keys[TFD_MAX_RAILS];
	struct tfd_list key_links[TFD_MAX_RAILS]; /* worker; in its rails' `regions` */
};

#define TFD_CLASSES 2u /* of jobs: TFD_PRIORITY_BULK, TFD_PRIORITY_LATENCY */

/* A request of ours. Its frame is free once the write is back and the answer is here. */
struct tfd_call {
	struct tfd_shard *shard; /* NULL: answered, or given up */
	uint64_t imm_number; /* in its order */
	uint32_t readies; /* its open's when it went out */
	bool writing;
};

/* Owner: worker; memory and registration: control, before and after. */
struct tfd_channel {
	uint8_t *memory; /* owned mapping */
	struct tfd_mr *mr;
	struct tfd_region_key key;
	uint64_t token; /* random */
	uint32_t number; /* in worker->channels */
	uint32_t far_number;
	uint64_t far_token;
	struct tfd_region_key far_key;
	/* outgoing */
	struct tfd_call calls[TFD_CALLS];
	uint32_t calls_open; /* not answered yet */
	uint64_t progress_ns; /* the last answer, or the first request */
	/* incoming */
	uint32_t answers_due; /* bitmaps of frames */
	uint32_t answers_writing;
	uint32_t checks_due; /* requests whose answer takes reading memory */
	struct tfd_frame answers[TFD_CALLS];
	struct tfd_list waiters; /* tfd_waiter.conn_link: those who wait, and those to be told */
	struct tfd_list readies; /* tfd_waiter.link: to be told */
};

#define TFD_WAITER_BUCKETS 1024u /* a power of two */

/* A far open that waits for a slot of a mailbox. Owner: worker. */
struct tfd_waiter {
	struct tfd_list link; /* mailbox->waiters, or channel->readies */
	struct tfd_list conn_link;
	struct tfd_list hash_link; /* worker->waiters, while it has a mailbox */
	struct tfd_waiter *next_free;
	struct tfd_mailbox *mailbox; /* NULL: is to be told */
	struct tfd_conn *conn;
	uint32_t sender; /* its number at the far worker */
};

/* Owner: worker. */
struct tfd_mailbox {
	uint64_t handle;
	struct tfd_session *session;
	struct tfd_region *region; /* counts as a job that reads it */
	struct tfd_letter *letters; /* in the region; write only */
	uint8_t *data; /* in the region; write only but for tfd_mailbox_take */
	uint32_t slots;
	uint32_t slot_bytes;
	uint32_t counter;
	uint32_t free_count;
	uint32_t *free; /* owned; stack of slots */
	uint32_t *order; /* owned; by number of the message modulo slots: its slot */
	struct tfd_letter *held; /* owned; by slot: its message; bytes TFD_NO_SLOT: none */
	uint64_t next; /* number of the next message */
	uint64_t next_taken; /* by tfd_mailbox_take */
	struct tfd_list waiters;
	struct tfd_list link; /* session->mailboxes */
	struct tfd_list ready_link; /* worker->mailboxes_ready while slots are free and somebody waits */
};

/* What goes by one channel of a connection, and comes: in this order. Owner: worker. */
struct tfd_order {
	uint64_t posted; /* immediates */
	uint64_t landed; /* immediates; incoming, on an ordered rail */
	uint64_t progress_ns; /* when the last piece came back, or the first went out */
	uint32_t inflight; /* pieces */
};

/* One half of a connection. Owner: worker. Kept while opens refer to it, even when closed. */
struct tfd_conn {
	uint64_t handle; /* constant */
	struct tfd_group *group;
	struct tfd_rail *rail;
	struct tfd_half *half; /* NULL once closed */
	bool outgoing;
	bool started;
	bool broken; /* no more posts; CONN_LOST was told */
	bool halted; /* its half is closed, and not drained yet */
	bool closing; /* somebody closes it; under core->lock */
	uint64_t peer; /* control's number of whom it leads to */
	struct tfd_order orders[TFD_CHANNELS_MAX]; /* of which its rail has so many */
	uint64_t imms_landed; /* of all orders */
	uint64_t void_until; /* of imms_landed; before that nobody knows what has landed: TFD_WC_VOID */
	bool uncounted; /* some of them may be missing there */
	uint32_t refs; /* shared: the table's, each open's, each caller's */
	uint64_t inflight_bytes;
	uint32_t inflight_wrs;
	uint64_t class_bytes[TFD_CLASSES]; /* of them, what shards have */
	uint32_t class_wrs[TFD_CLASSES];
	uint64_t awaited_bytes[TFD_CLASSES]; /* the piece that was the last to ask for room */
	uint64_t window_bytes; /* that may be in flight; window.c */
	uint64_t least_ns; /* that a piece took */
	uint64_t bound_ns; /* what a piece may take */
	uint64_t shrunk_ns; /* when the window became smaller last */
	bool window_rises; /* no piece has taken too long yet */
	bool window_tight[TFD_CLASSES]; /* the last piece to be posted did not fit */
	uint64_t stalled_ns; /* since when nothing can be posted though nothing is in flight; 0: not so */
	struct tfd_list lanes; /* tfd_lanes.conn_link: of all sessions that have an open with a path by it */
	struct tfd_list held[TFD_CLASSES]; /* tfd_lane.link: those that wait until it takes something */
	bool holds[TFD_CLASSES];
	bool stands; /* nothing has come back for a while: its bulk is off its rail's pace */
	struct tfd_list creditless[TFD_CLASSES]; /* tfd_lane.credit_link */
	struct tfd_list messages; /* shards with a request to make */
	struct tfd_channel *channel; /* owned; NULL once closed */
	struct tfd_credits credits;
	struct tfd_wr *outstanding; /* doubly linked */
	struct tfd_list inflight_link; /* on worker->conns_inflight while there are any */
	struct tfd_list busy_link; /* on worker->conns_busy: lanes are held, messages or a probe wait */
	struct tfd_list link; /* on worker->conns while it has a half */
	struct tfd_wr *probe; /* its piece, while it is under way */
	uint8_t probe_state; /* enum tfd_probe_state */
	uint8_t probe_traffic; /* enum tfd_traffic: by each channel in turn */
};

enum tfd_probe_state {
	TFD_PROBE_NONE = 0,
	TFD_PROBE_WAITS = 1, /* to be posted: the connection may not be up yet */
	TFD_PROBE_POSTED = 2,
};

struct tfd_path {
	struct tfd_conn *conn; /* shared (refcount) */
	struct tfd_lanes *lanes; /* shared (refcount; worker) */
	uint64_t key;
	uint64_t address;
};

/* A grant of another session, opened for this one. Owner: worker. */
struct tfd_open {
	uint64_t handle;
	struct tfd_session *session;
	struct tfd_path paths[TFD_MAX_PATHS];
	uint32_t path_count;
	uint8_t next_path; /* of the next shard */
	uint32_t rights;
	uint64_t length;
	uint32_t imm_first;
	uint32_t imm_count;
	uint32_t name_space;
	uint64_t expires_ns;
	uint32_t refused; /* enum tfd_detail of new jobs once it is revoked */
	bool device; /* constant: paths with key 0 take no bytes */
	uint32_t unreached; /* enum tfd_detail of a job that no path carries */
	struct tfd_list shards; /* in flight */
	/* Of a mailbox: messages that wait for a slot there, or for their turn. */
	struct tfd_list parked;
	uint32_t sender; /* number for READY; TFD_NO_SLOT: it is no mailbox's */
	uint32_t readies; /* READYs that came */
	uint8_t sends_inflight;
	uint8_t send_window;
	bool full; /* no message goes out before READY */
	uint8_t full_path; /* by which it was told so last */
	uint64_t wait_ns; /* when that was, or it was looked at last */
	struct tfd_list wait_link; /* on worker->senders_waiting while it is full, or has parked ones */
	uint64_t next_shard; /* number of the next shard: tells which were there before a fence */
	struct tfd_list fences;
};

/* Waits until no shard that was in flight on some immediates is any more. Owner: worker. */
struct tfd_fence {
	struct tfd_list link; /* open->fences */
	uint64_t number;
	uint64_t before; /* shards with smaller numbers */
	uint64_t left; /* of those that it names */
	uint32_t detail; /* STILL_COPIED: one has left before its stream was through */
	uint32_t range_count;
	struct tfd_imm_range ranges[]; /* ascending, apart */
};

#define TFD_BATCH_PIECES 512u

/* A part of what one post will carry: bytes that are adjacent on both sides. */
struct tfd_piece {
	uint64_t src_offset; /* into the region */
	uint64_t dst_offset; /* into the grant */
	uint64_t length;
	uint32_t pages;
};

/* A part of a page table, copied and checked; what is posted is read from here only. Owner: worker. */
struct tfd_batch {
	struct tfd_batch *next_free;
	uint32_t count;
	uint32_t next;
	struct tfd_piece pieces[TFD_BATCH_PIECES];
};

enum tfd_shard_state {
	TFD_SHARD_DATA = 0, /* pieces to post, their immediates among them */
	TFD_SHARD_DRAIN = 1, /* everything posted, acknowledgements to come */
	TFD_SHARD_TRAILING = 2, /* data acknowledged, immediates to post */
	TFD_SHARD_DONE = 3, /* acknowledged, or failed and quiet */
	TFD_SHARD_VERIFY = 4, /* data acknowledged, its checksums to ask, or asked */
};

/* The part of a job that travels on one path of one open. Owner: worker. */
struct tfd_shard {
	struct tfd_list link; /* in its lane, its conn's messages, worker->waiting, or parked with its open */
	struct tfd_lane *lane; /* NULL: in none */
	struct tfd_list open_link; /* open->shards, until it is settled */
	struct tfd_job *job;
	struct tfd_open *open; /* NULL once settled */
	uint64_t number; /* in its open */
	bool queued;
	bool trails; /* its immediates follow the acknowledgement of its data */
	bool failed; /* of a scatter: this target alone */
	bool data_done; /* all of it acknowledged, and compared */
	bool checked; /* all of it compared by the receiver */
	bool refused; /* a device has refused a piece of it, once */
	bool returns; /* memory at its far end is not open: it waits once all its pieces are back */
	uint8_t waited; /* enum tfd_waited: for memory that was not open, since a piece of it landed last */
	uint8_t state; /* enum tfd_shard_state */
	uint8_t path;
	uint64_t first; /* where it begins in the job: bytes, or pages; targets of a scatter: 0 */
	uint64_t src_offset; /* of the job's, or the target's, beginning */
	uint64_t dst_offset;
	uint64_t length; /* bytes, or pages */
	uint64_t posted; /* of length */
	uint64_t acked; /* of length; in order on ordered rails */
	/* Counts in eighths of a write. */
	uint64_t units; /* that it has to pay in all */
	uint64_t units_owed; /* due now */
	uint64_t units_posted;
	uint64_t units_acked;
	uint64_t units_unknown; /* posted, and their fate is not known */
	uint32_t inflight;
	uint32_t tries; /* how often it has returned: each has a chain of its own */
	uint64_t waits_ns; /* since when it does */
	uint64_t again_ns; /* on worker->waiting: when it goes again */
	struct tfd_batch *batch; /* of pages; while it posts */
	uint64_t piece_posted; /* of the batch's next piece, which may be longer than a segment */
};

/* Tables that came with control's submit, until the last job that reads them has ended. */
struct tfd_tables {
	struct tfd_tables *next; /* in source->tables_done */
	uint32_t refs; /* worker, after publishing */
	size_t bytes;
	uint8_t data[];
};

#define TFD_SESSION_SLOTS 262144u /* of a session's mailboxes: some 6 MiB */
#define TFD_SESSION_SHARDS 65536u /* of a session's jobs in flight: some 11 MiB */
#define TFD_SESSION_PLAN_TARGETS 65536u /* of all plans of a session: 2 MiB */
#define TFD_JOB_CLASSES 5u /* 1, 8, 64, 512 or 4096 shards */

/* A job in flight. Owner: worker. */
struct tfd_job {
	struct tfd_list link; /* session->jobs, oldest first; free list afterwards */
	struct tfd_heap_item deadline; /* worker->deadlines; key: deadline_ns or copy_until_ns */
	struct tfd_heap_item armed; /* watch->jobs; key: the value that starts it */
	struct tfd_watch *watch; /* NULL: it has started, or waits for nothing */
	bool polled;
	bool begun; /* its shards are on their way */
	bool copy_void; /* its stream will find it so */
	bool copy_given_up; /* its stream was not through in time */
	uint64_t deadline_ns; /* CLOCK_MONOTONIC; 0: none */
	uint64_t copy_until_ns; /* until when what has failed waits for its stream; 0: nothing does */
	uint32_t *copy_mark; /* of what waits for a trigger: see struct tfd_copy_marks; else NULL */
	const uint64_t *trigger; /* with it: the word; untrusted */
	uint64_t trigger_at;
	uint64_t *
		places; /* of a copied scatter: where its stream writes, by target; in the arena, write only */
	struct tfd_session *session;
	struct tfd_source *source;
	struct tfd_open *open; /* NULL: each shard has its own */
	struct tfd_region *region; /* NULL for an imm */
	struct tfd_tables *tables; /* NULL: the arena's */
	const uint8_t *table; /* untrusted; pages */
	const uint8_t *launch; /* untrusted; table of the plan, read when the job begins; NULL: it has none */
	uint32_t capacity; /* entries of it */
	uint32_t parts; /* shards that carry something: all, but for launches that take less than there is */
	uint64_t job_id;
	uint64_t number; /* of the session's jobs, in the order in which they could go */
	uint32_t record;
	uint8_t op;
	uint8_t flags;
	uint8_t priority;
	uint8_t status; /* enum tfd_job_status: PENDING, or how it ends once it is quiet */
	uint8_t shard_class;
	uint8_t part_status; /* how it will end because of single targets */
	bool packed; /* a post has carried several pieces */
	uint32_t detail;
	uint32_t shard_count;
	uint32_t imm; /* the application's */
	uint32_t inflight; /* posted pieces not back yet */
	uint32_t shards_left; /* not DONE */
	uint32_t data_left; /* shards whose data is not acknowledged */
	uint64_t length; /* bytes, pages: of each */
	uint64_t src_offset;
	uint64_t dst_offset;
	uint64_t src_stride;
	uint64_t dst_stride;
	uint64_t counts; /* on its immediate, write and pages; 0: none are told lost */
	uint64_t rails; /* bitmap of those used */
	const struct tfd_provider_ops *ops; /* of the last piece */
	uint64_t acked; /* bytes */
	uint64_t accepted_ns;
	uint64_t posted_ns;
	struct tfd_shard shards[]; /* [shard_count] */
};

/* A submit ring with its completion records: the client's in the segment, or control's in private memory. */
struct tfd_source {
	struct tfd_ring *ring; /* untrusted when it is the client's */
	struct tfd_entry *entries;
	struct tfd_record *records; /* write only */
	struct tfd_job **in_flight; /* by record; worker */
	uint32_t entry_mask;
	uint32_t record_count;
	uint32_t head; /* worker; the ring's is a copy for the client */
	bool control; /* control's own */
	const uint8_t *arena; /* untrusted; the client's */
	uint64_t arena_bytes;
	struct tfd_tables **tables; /* control's, by entry; NULL: none */
	struct tfd_tables *tables_done; /* shared: stack of those to be freed */
	size_t tables_bytes; /* control's, not freed yet; core->lock */
};

/* What the worker knows of a counter; the segment holds copies. Owner: worker. */
struct tfd_count {
	int64_t eighths; /* below 0 while what is taken out has not arrived */
	uint64_t value; /* published; only grows */
	uint64_t faults;
	uint64_t lost;
	uint64_t acknowledged;
	uint32_t imm;
	bool in_use;
};

/* Parts of cut writes that a peer has landed on a counter, modulo whole writes: taken out if it dies. Owner: worker. */
struct tfd_fraction {
	struct tfd_fraction *next; /* session->fractions[slot % TFD_FRACTION_BUCKETS] */
	uint64_t peer;
	uint32_t slot;
	uint32_t units; /* 1 to 7 */
};

#define TFD_FRACTION_BUCKETS 64u

enum tfd_session_state {
	TFD_STATE_OPEN = 0,
	TFD_STATE_BROKEN = 1, /* told to control, rings not read */
	TFD_STATE_ENDING = 2, /* jobs cancelled, waits for quiet */
	TFD_STATE_QUIET = 3,
};

struct tfd_session {
	/* constant */
	uint64_t handle;
	struct tfd_core *core;
	struct tfd_group *group;
	uint32_t name_space;
	uint32_t counter_count;
	int segment_fd;
	/*
	 * Pipes, not eventfds: the two ends of an eventfd share their O_NONBLOCK, and a client that clears it could block us. We
	 * keep the client's ends open, too, so that its closing them is no event.
	 */
	int doorbell[2]; /* the client writes [1] */
	int event[2]; /* the client reads [0] */
	int control_fd;
	uint8_t *segment;
	uint64_t segment_bytes;
	struct tfd_segment_header *header;
	struct tfd_counter *counters; /* in the segment; write only */

	/* control */
	uint32_t refs;
	bool closing;
	uint64_t next_control_job; /* written under core->lock, read relaxed */
	uint32_t control_ready; /* shared: sources[1] is there */

	/* worker */
	struct tfd_source sources[2]; /* client's, control's (ring NULL until first used) */
	struct tfd_count *counts; /* [counter_count] */
	uint32_t *imm_pages[TFD_IMM_COUNT / TFD_IMM_PAGE];
	uint32_t counters_used;
	struct tfd_fraction *fractions[TFD_FRACTION_BUCKETS];
	struct tfd_table regions;
	struct tfd_table opens;
	struct tfd_list mailboxes;
	uint32_t mailbox_slots; /* of all of them */
	uint32_t counter_free; /* a mailbox's before; next in counts[].imm; TFD_NO_SLOT: none */
	struct tfd_watch *watches; /* owned, [watcher_count] */
	uint32_t watcher_count;
	uint32_t armed_count; /* jobs that wait for a watcher */
	uint64_t armed_order; /* of the next one */
	struct tfd_template **plans; /* owned, [plan_count] */
	uint32_t plan_count;
	uint32_t plan_targets; /* room for them in all plans */
	uint32_t targets_wasted; /* in this pass, or command: read for jobs that did not start */
	uint32_t started; /* armed jobs, in this pass */
	struct tfd_list jobs;
	uint32_t job_count;
	uint32_t shard_count; /* of jobs in flight */
	uint64_t next_job;
	struct tfd_flow *flows; /* owned; [rails of the group][TFD_CLASSES] */
	struct tfd_list link; /* worker->sessions */
	uint8_t state; /* enum tfd_session_state; others look, relaxed */
	bool control_watch; /* control wants control_fd signalled */

	/* shared */
	uint64_t *wake_counters; /* bitmaps: which futex words to wake */
	uint64_t *wake_records;
	uint32_t wake_pending;
	uint32_t wake_control; /* control_fd is due */
	uint32_t wake_event; /* event_fd is due */
	struct tfd_session *wake_next;
	uint32_t losses_queued; /* LOST events that control has not taken yet */
	struct tfd_session_info stat; /* worker writes, anyone reads, relaxed */
};

struct tfd_rail {
	const struct tfd_provider_ops *ops;
	struct tfd_domain *domain;
	struct tfd_rail_info info; /* counters and state: worker writes, anyone reads, relaxed */
	uint32_t index;
	bool last_resort; /* carries only what no other path of an open reaches */
	uint64_t patience_ns; /* with a connection on which nothing moves */
	uint64_t since_ns; /* worker; since when info.state is what it is */
	uint32_t orders; /* of each connection: 1, or one for each enum tfd_traffic */
	int wait_fd;
	uint64_t segment_bytes; /* most bytes posted at once */
	struct tfd_list round[TFD_CLASSES]; /* worker; tfd_flow.link: whose turn is next */
	struct tfd_pace pace; /* worker */
	uint64_t lead; /* worker; bytes that latency is ahead while bulk waits for its turn */
	/* Of info.imm_depth. Owner: worker. */
	uint32_t credits_free;
	uint32_t credits_late[2]; /* of halves that were closed a while ago, and lately */
	uint64_t credits_late_ns; /* when the first of them are free again */
	struct tfd_list regions[TFD_KEY_BUCKETS]; /* worker; tfd_region.key_links, by key */
};

/* A domain group: the rails of one worker. Constant after opening. */
struct tfd_group {
	struct tfd_core *core;
	struct tfd_rail rails[TFD_MAX_RAILS];
	uint32_t rail_count;
	uint32_t index;
	uint64_t window_bytes; /* at most, of each connection */
	bool segment_given; /* pieces are as long as configured, whatever the window */
	uint64_t cut_bytes; /* writes below twice this are not cut */
	struct tfd_stages *stages; /* owned; providers/staged; NULL: no rail is staged */
	struct tfd_worker *worker;
};

struct tfd_command {
	struct tfd_command *next;
	int (*run)(struct tfd_worker *worker, void *argument);
	void *argument;
	int rc;
	uint32_t done; /* futex */
};

#define TFD_PENDING_EVENTS 1024u

struct tfd_worker {
	struct tfd_core *core; /* constant */
	struct tfd_group *group;
	pthread_t thread;
	int epoll_fd;
	int wake_fd;

	struct tfd_command *inbox; /* shared: stack of commands */
	uint32_t sleeping; /* shared */

	/* worker */
	bool stop;
	uint32_t guard_hits; /* as of the last look */
	struct tfd_list sessions;
	struct tfd_session *name_spaces[TFD_NAME_SPACES];
	struct tfd_list conns; /* all that are open */
	struct tfd_list conns_busy;
	uint32_t first_rail; /* of the next pass */
	struct tfd_list conns_inflight;
	uint64_t next_stall_check_ns;
	uint64_t next_pace_ns;
	struct tfd_heap deadlines;
	struct tfd_list watched; /* tfd_watch.link */
	uint32_t polled; /* armed jobs whose watchers wake nobody */
	uint32_t jobs_made; /* that exist, in flight or in the pools */
	struct tfd_wr *wr_pool;
	struct tfd_wr *wr_free;
	struct tfd_job *job_free[TFD_JOB_CLASSES]; /* by link.next */
	struct tfd_template *plan_free[TFD_JOB_CLASSES];
	struct tfd_batch *batch_free;
	struct tfd_post_part parts[TFD_BATCH_PIECES]; /* of the post that is being made */
	struct tfd_fraction *fraction_free;
	struct tfd_waiter *waiter_free;
	struct tfd_list waiters[TFD_WAITER_BUCKETS]; /* of all mailboxes, by mailbox, connection and sender */
	struct tfd_table mailboxes;
	struct tfd_list mailboxes_ready;
	uint64_t next_mailbox_check_ns;
	uint32_t check_left; /* bytes that may be read for checksums in this pass */
	struct tfd_numbers channels; /* of struct tfd_conn */
	struct tfd_numbers senders; /* of struct tfd_open */
	struct tfd_list senders_waiting; /* tfd_open.wait_link, by wait_ns */
	struct tfd_list waiting; /* tfd_shard.link, by again_ns: for memory that is not open */
	struct tfd_event events[TFD_PENDING_EVENTS]; /* on their way to the core's queue */
	uint32_t event_count;
	uint64_t now_ns;
	uint64_t active_ns;
	uint64_t spin_ns; /* from options.spin_us to SPIN_IN_FLIGHT_NS: longer while sleeps end at once */
	uint32_t inflight_wrs; /* of all connections */
	uint64_t dropped_imms; /* outside every grant */
};

struct tfd_waker {
	pthread_t thread;
	bool running;
	pthread_mutex_t lock; /* held while words are woken; taken by session close */
	struct tfd_session *stack; /* shared */
	uint32_t sleeping; /* shared; futex */
	uint32_t stop; /* shared */
};

struct tfd_core {
	struct tfd_core_options options;
	pthread_mutex_t lock; /* guards the tables below and session->refs */
	pthread_cond_t refs_changed;
	struct tfd_table sessions;
	struct tfd_table conns;
	struct tfd_group *groups[TFD_MAX_RAILS];
	uint32_t group_count;
	uint8_t name_space_used[TFD_NAME_SPACES];
	uint32_t name_space_next;

	pthread_mutex_t event_lock; /* guards the queue */
	struct tfd_event *queue;
	uint32_t queue_head;
	uint32_t queue_count;
	uint32_t queue_capacity;
	int event_fd;

	struct tfd_waker waker;
	struct tfd_heartbeat *heartbeat;
};

#endif
