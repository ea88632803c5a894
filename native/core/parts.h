/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the core call of each other. "worker" functions run on the worker thread only. */
#ifndef TFD_PARTS_H
#define TFD_PARTS_H

#include "armed.h"
#include "list.h"
#include "model.h"

/* stage.c */
int tfd_group_stages_open(struct tfd_group *group, uint64_t bytes, struct tfd_error *error);

/* error.c */
int tfd_fail(struct tfd_error *error, int rc, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* clock.c */
uint64_t tfd_now_ns(void);

/* event.c */
int tfd_events_open(struct tfd_core *core);
void tfd_events_close(struct tfd_core *core);
void tfd_event_push(struct tfd_core *core, const struct tfd_event *event); /* control, heartbeat */
void tfd_event_post(struct tfd_worker *worker, const struct tfd_event *event); /* worker */
void tfd_events_flush(struct tfd_worker *worker);                              /* worker */

/* command.c */
int tfd_command_run(struct tfd_worker *worker, int (*run)(struct tfd_worker *, void *), void *argument);
bool tfd_commands_take(struct tfd_worker *worker); /* worker; whether there were any */

/* waker.c */
int tfd_waker_open(struct tfd_core *core);
void tfd_waker_close(struct tfd_core *core);
void tfd_waker_drain(struct tfd_core *core); /* control: after it, no session detached before is touched */
void tfd_wake_counter(struct tfd_session *session, uint32_t slot);
void tfd_wake_record(struct tfd_session *session, struct tfd_source *source, uint32_t record);

/* worker.c */
int tfd_worker_open(struct tfd_core *core, struct tfd_group *group, struct tfd_error *error);
void tfd_worker_close(struct tfd_worker *worker);
uint32_t tfd_worker_poll_hot(struct tfd_worker *worker); /* one pass; whether anything was done */
int tfd_worker_watch(struct tfd_worker *worker, int fd);
void tfd_worker_unwatch(struct tfd_worker *worker, int fd);
void tfd_completion_handle(struct tfd_worker *worker, struct tfd_rail *rail, const struct tfd_wc *wc);

/* ring.c */
void tfd_entry_end(struct tfd_session *session, struct tfd_source *source, const struct tfd_entry *entry,
                   uint32_t status, uint32_t detail);
uint32_t tfd_ring_drain(struct tfd_worker *worker, struct tfd_session *session, struct tfd_source *source);
void tfd_session_break(struct tfd_session *session, uint32_t detail);

/* take.c */
struct tfd_taking {
	struct tfd_worker *worker;
	struct tfd_session *session;
	struct tfd_source *source;
	const struct tfd_entry *entry;
	struct tfd_tables *tables;
	const struct tfd_template *plan; /* that is launched, or made; NULL: none */
	struct tfd_region *region;
	uint64_t trigger_at; /* of what is copied after a trigger */
};

void tfd_take_job(struct tfd_taking *taking);
void tfd_take_launch(struct tfd_taking *taking);
void tfd_take_plan(struct tfd_taking *taking);

/* job.c */
struct tfd_job *tfd_job_alloc(struct tfd_session *session,
                              uint32_t shard_count); /* NULL: too many, or no memory */
void tfd_job_drop(struct tfd_job *job); /* not started */
uint32_t tfd_job_class_shards(uint8_t shard_class);
uint8_t tfd_job_class(uint32_t shard_count); /* the least that has room for so many */
void tfd_job_start(struct tfd_job *job);
void tfd_job_enter(struct tfd_job *job); /* in flight, but nothing goes out yet */
void tfd_job_go(struct tfd_job *job); /* it has entered: its shards are queued */
void tfd_job_fail(struct tfd_job *job, uint32_t status, uint32_t detail);
void tfd_job_finish_if_quiet(struct tfd_job *job);
void tfd_jobs_free(struct tfd_worker *worker); /* the pools */
void tfd_jobs_discard(struct tfd_session *session);
void tfd_record_end(struct tfd_session *session, struct tfd_source *source, uint32_t record,
                    const struct tfd_record *end);

/* copied.c */
bool tfd_copied_runs(const struct tfd_job *job); /* its client's stream may write for it yet */
void tfd_copied_fail(struct tfd_job *job); /* it has failed: its copy is void, or waited for within a bound */
/* One target of it has. True: no stream writes to it. */
bool tfd_copied_target_fail(struct tfd_job *job, uint32_t target);
/* It waits for a trigger, and can be made void as a whole, but not one target of it. */
bool tfd_copied_whole(const struct tfd_job *job);
void tfd_copied_leave(struct tfd_job *job); /* its stream is through: targets that failed are done */
void tfd_copied_give_up(struct tfd_job *job); /* the bound has passed */

/* deadline.c */
void tfd_deadline_add(struct tfd_worker *worker, struct tfd_job *job); /* if it has one */
void tfd_deadline_remove(struct tfd_worker *worker, struct tfd_job *job); /* idempotent */
uint64_t tfd_deadline_next(const struct tfd_worker *worker); /* UINT64_MAX: none */
void tfd_deadlines_check(struct tfd_worker *worker);

/* armed.c */
int tfd_watches_open(struct tfd_session *session, struct tfd_watcher *watchers, uint32_t count);
void tfd_watches_free(struct tfd_session *session); /* no job waits */
bool tfd_arm(struct tfd_job *job, const struct tfd_entry *entry); /* false: too many, or no memory */
void tfd_disarm(struct tfd_job *job); /* idempotent */
void tfd_job_begin(struct tfd_job *job); /* it has entered: goes out as things are now */
void tfd_watch_clear(struct tfd_watch *watch); /* its jobs are cancelled */
uint32_t tfd_watches_check(struct tfd_worker *worker); /* how many jobs were started */
bool tfd_watches_ready(const struct tfd_worker *worker); /* the last look before a sleep */

/* plan.c */
int tfd_plans_open(struct tfd_session *session, uint32_t count);
void tfd_plans_free(struct tfd_session *session); /* once no worker knows it */
void tfd_plan_pools_free(struct tfd_worker *worker);
/* Takes that number, which is free; its targets are to be filled. NULL: too many targets, or no memory. */
struct tfd_template *tfd_plan_add(struct tfd_session *session, uint32_t number, uint32_t target_count);
struct tfd_template *tfd_plan_get(const struct tfd_session *session, uint64_t number); /* NULL: none */
void tfd_plan_remove(struct tfd_session *session, uint32_t number);
void tfd_launch_enter(struct tfd_job *job); /* what is known of a launch before its table is read */
uint32_t tfd_launch_read(struct tfd_job *job); /* its sizes and offsets; enum tfd_detail */

/* cut.c */
/* `region`: at the near end of its bytes, which some paths may not reach; NULL: there are none. */
uint32_t tfd_cut_count(const struct tfd_open *open, const struct tfd_region *region, uint64_t length,
                       bool eighths, uint64_t least);
bool tfd_open_reaches(const struct tfd_open *open, const struct tfd_region *region); /* by some path */
bool tfd_shard_goes_by(const struct tfd_shard *shard, uint8_t path); /* it reaches what the shard moves */
void tfd_job_cut(struct tfd_job *job);
/*
 * Whether it takes parts of so many bytes, to its grant or, of a read, to `region`: a GPU's copy engine, which staging goes by, writes no
 * single byte (gpu/copy.c).
 */
bool tfd_open_takes(const struct tfd_open *open, const struct tfd_region *region, bool reads, uint64_t bytes);

/* The next piece of what is longer than a segment: what is left is no single byte. */
static inline uint64_t tfd_cut_piece(uint64_t left, uint64_t segment)
{
	return left == segment + 1 && segment > 1 ? segment - 1 : segment;
}

/* pages.c */
/* What goes out next for a shard. */
struct tfd_plan {
	uint64_t src_offset; /* of the first part */
	uint64_t dst_offset;
	uint64_t first; /* bytes of the first part */
	uint64_t length; /* of all parts */
	uint64_t extent; /* of the shard: bytes, or pages that are complete with it */
	uint32_t pieces; /* of the batch that are complete with it: parts of one post, or posts */
	uint32_t units;
};

int tfd_batch_fill(struct tfd_shard *shard); /* -EINVAL: job->detail says why; -ENOMEM */
void tfd_batch_drop(struct tfd_shard *shard);
int tfd_pages_plan(struct tfd_shard *shard, const struct tfd_conn *conn, uint64_t segment,
                   struct tfd_plan *plan); /* as tfd_batch_fill */
/* The parts after the first; `parts` has room for all of them. */
void tfd_pages_parts(const struct tfd_shard *shard, const struct tfd_plan *plan, struct tfd_post *post,
                     struct tfd_post_part *parts);
void tfd_pages_posted(struct tfd_shard *shard, uint32_t pieces,
                      uint64_t bytes); /* pieces that are complete */

/* shard.c */
void tfd_shard_queue(struct tfd_shard *shard); /* on its connection */
void tfd_shard_enter(
	struct tfd_shard *shard); /* in its open's list: whoever waits for the open waits for it */
void tfd_shard_go(struct tfd_shard *shard);
void tfd_shard_fail(struct tfd_shard *shard, uint32_t status, uint32_t detail);
/* Its connection is gone: what has not landed goes out again; without another path it fails with `detail`. */
void tfd_shard_move(struct tfd_shard *shard, uint32_t detail);
void tfd_shard_unqueue(struct tfd_shard *shard);
void tfd_shard_settle(struct tfd_shard *shard); /* leaves its open */
void tfd_shard_done(struct tfd_shard *shard);
void tfd_shard_skip(struct tfd_shard *shard); /* nothing is left for it to carry */
bool tfd_shard_path_next(struct tfd_shard *shard); /* to another path that lives; false: there is none */
void tfd_shard_advance(struct tfd_shard *shard); /* after an acknowledgement */
void tfd_shard_rewind(struct tfd_shard *shard); /* all its pieces are back: to what has not landed */
bool tfd_shard_has_more(const struct tfd_shard *shard); /* to post */

/* wait.c */
#define TFD_WAIT_MS 5 /* for memory that is not open, until it is tried again */
/* Its next piece could not be posted: -EBUSY. The job may have ended. */
void tfd_wait_near(struct tfd_worker *worker, const struct tfd_conn *conn, struct tfd_shard *shard);
/* All its pieces are back, one of them as TFD_WC_NOT_OPEN. It may have failed. */
void tfd_wait_far(struct tfd_worker *worker, struct tfd_shard *shard);
void tfd_wait_over(struct tfd_shard *shard); /* a piece has landed */
uint64_t tfd_wait_segment(const struct tfd_shard *shard, uint64_t segment);
uint32_t tfd_waits_check(struct tfd_worker *worker); /* how many go again */
void tfd_waits_move(struct tfd_conn *conn, uint32_t detail); /* its connection is closed */

/* schedule.c. Lanes and flows come and go by commands, which may allocate. */
int tfd_lanes_get(struct tfd_session *session, struct tfd_conn *conn, struct tfd_lanes **out); /* -ENOMEM */
void tfd_lanes_put(struct tfd_lanes *lanes); /* NULL-safe */
int tfd_flows_open(struct tfd_session *session, uint32_t weight); /* control, before the worker knows it */
void tfd_schedule_enter(struct tfd_shard *shard); /* it has something to post by its path */
void tfd_schedule_leave(struct tfd_shard *shard);
void tfd_schedule_charge(const struct tfd_shard *shard, uint64_t bytes,
                         uint32_t posts); /* they were posted */
void tfd_schedule_resume(struct tfd_conn *conn, uint32_t priority);
void tfd_schedule_move(struct tfd_conn *conn, uint32_t detail); /* all its shards, to other paths */
uint32_t tfd_schedule_post(struct tfd_worker *worker);

/* post.c */
uint32_t tfd_conns_post(struct tfd_worker *worker);
/* As tfd_provider_ops.post: one post, or pieces that together are worth one. */
int tfd_shard_post(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_shard *shard);
void tfd_conns_check_progress(struct tfd_worker *worker);

/* wr.c */
/* Acknowledged pieces of shards from the beginning of `wc` on; how many there were. */
uint32_t tfd_wrs_acked(struct tfd_worker *worker, const struct tfd_wc *wc, uint32_t count);
void tfd_wr_done(struct tfd_worker *worker, struct tfd_wr *wr, const struct tfd_wc *wc);
/* As tfd_wr_done, but the provider may still name wr in a late completion: it is not used again before that. */
void tfd_wr_abandon(struct tfd_wr *wr, const struct tfd_wc *wc);
/* A piece that surely has not landed: its shard goes out again. */
void tfd_wr_return(struct tfd_wr *wr);

/* window.c */
void tfd_window_open(struct tfd_conn *conn);
uint64_t tfd_window_segment(const struct tfd_conn *conn, uint32_t priority);
/* Whether so many bytes of that class may go out; if not, they are what it waits for. */
bool tfd_window_takes(struct tfd_conn *conn, uint32_t priority, uint64_t length);
bool tfd_window_opens(struct tfd_conn *conn, uint32_t priority); /* for what did not fit last */
uint32_t tfd_window_posts(const struct tfd_conn *conn,
                          uint32_t priority); /* how many more may go, at least 1 */
void tfd_window_learn(struct tfd_conn *conn, const struct tfd_wr *wr, uint64_t took_ns);

static inline void tfd_window_acked(struct tfd_conn *conn, const struct tfd_wr *wr, uint64_t took_ns)
{
	if (took_ns < conn->least_ns || took_ns > conn->bound_ns || conn->window_tight[wr->job->priority])
		tfd_window_learn(conn, wr, took_ns);
}

/* credits.c */
int tfd_credits_open(struct tfd_conn *conn, struct tfd_error *error); /* -ENOSPC */
/* Its share is free again. `quiet`: at once, for nothing comes by it any more. */
void tfd_credits_close(struct tfd_conn *conn, bool quiet);
uint32_t tfd_credits_grant(const struct tfd_conn *conn); /* to be told to the far half; 0: without bound */
void tfd_credits_join(struct tfd_conn *conn, uint32_t grant); /* the far half's */
bool tfd_credits_may_post(
	struct tfd_conn *conn); /* notes that something waits for a credit, if none is left */
void tfd_credits_wait(struct tfd_conn *conn, struct tfd_shard *shard);
void tfd_credits_release(struct tfd_conn *conn); /* those that wait, if there are credits */
void tfd_credits_move(struct tfd_conn *conn, uint32_t detail);
void tfd_credits_ask(struct tfd_conn *conn);
void tfd_credits_posted(struct tfd_conn *conn, uint32_t message);
void tfd_credits_arrived(struct tfd_conn *conn, uint32_t message, uint64_t number);
void tfd_credits_flooded(struct tfd_conn *conn);
void tfd_credits_check(struct tfd_conn *conn);

static inline bool tfd_credits_left(const struct tfd_conn *conn)
{
	return conn->credits.taken < conn->credits.limit;
}

static inline bool tfd_credits_shards_wait(const struct tfd_conn *conn)
{
	return !tfd_list_empty(&conn->creditless[TFD_PRIORITY_BULK]) ||
	       !tfd_list_empty(&conn->creditless[TFD_PRIORITY_LATENCY]);
}

static inline void tfd_credits_acked(struct tfd_conn *conn)
{
	if (++conn->credits.acked >= conn->credits.ask_at)
		tfd_credits_ask(conn);
}

/* pace.c */
void tfd_paces_check(struct tfd_worker *worker);
void tfd_pace_urgent(struct tfd_rail *rail, struct tfd_worker *worker); /* something urgent is to go out */
bool tfd_pace_takes_bulk(const struct tfd_rail *rail);
uint64_t tfd_pace_segment(const struct tfd_rail *rail); /* longest piece of bulk */
void tfd_pace_enter(struct tfd_conn *conn, uint64_t length); /* bulk in flight */
void tfd_pace_leave(struct tfd_conn *conn, uint64_t length);
void tfd_pace_acked(struct tfd_conn *conn, uint64_t length); /* of any class */

/* loss.c */
void tfd_loss_tell(const struct tfd_shard *shard, uint32_t status, uint32_t detail);
bool tfd_losses_wait(const struct tfd_session *session); /* so many that it may start nothing */

/* counter.c */
void tfd_imm_arrived(struct tfd_worker *worker, uint64_t peer, uint32_t wire);
uint32_t tfd_counter_find(const struct tfd_session *session, uint32_t imm);
int tfd_counter_give(struct tfd_session *session, uint32_t imm, uint32_t *slot);
void tfd_counter_fault(struct tfd_session *session, uint32_t slot, uint64_t lost, uint64_t units,
                       uint64_t peer);
void tfd_fractions_free(struct tfd_session *session); /* once no worker knows it */
void tfd_counter_acknowledge(struct tfd_session *session, uint32_t slot);
int tfd_counter_give_unnamed(struct tfd_session *session, uint32_t *slot); /* of no immediate; -ENOSPC */
void tfd_counter_return(struct tfd_session *session, uint32_t slot);
void tfd_counter_add(struct tfd_session *session, uint32_t slot); /* one write */

/* conn.c */
static inline uint32_t tfd_order_of(const struct tfd_rail *rail, uint32_t traffic)
{
	return rail->orders == 1 ? 0 : traffic;
}

void tfd_conn_put(struct tfd_conn *conn);
struct tfd_conn *tfd_conn_get(struct tfd_core *core, uint64_t handle); /* takes a reference; NULL: closed */
void tfd_conn_drop(struct tfd_core *core,
                   uint64_t handle); /* closes it as the core ends, whoever copies yet */
void tfd_conn_break(struct tfd_conn *conn, uint32_t detail);
void tfd_conn_wake(struct tfd_conn *conn); /* it has something to look at in each pass */
void tfd_conns_uncounted(struct tfd_worker *worker, const struct tfd_rail *rail, const struct tfd_conn *only);

/* rail.c */
uint32_t tfd_rail_state(const struct tfd_rail *rail); /* any thread; enum tfd_rail_state */
int tfd_rail_usable(const struct tfd_rail *rail,
                    struct tfd_error *error); /* any thread; -ENODEV, -ENETDOWN */
void tfd_rail_gone(struct tfd_worker *worker, struct tfd_rail *rail);
void tfd_rails_check(struct tfd_worker *worker);
void tfd_rail_error(struct tfd_worker *worker, struct tfd_rail *rail, const struct tfd_wc *wc);

/* probe.c */
int tfd_probe_post(struct tfd_worker *worker, struct tfd_conn *conn); /* as tfd_provider_ops.post */
void tfd_probe_done(struct tfd_worker *worker, struct tfd_wr *wr, const struct tfd_wc *wc);
void tfd_probe_drop(struct tfd_conn *conn); /* its connection is closed */

/* fence.c */
bool tfd_fence_names(const struct tfd_fence *fence, const struct tfd_job *job);
void tfd_fences_leave(struct tfd_open *open, const struct tfd_shard *shard); /* it is quiet */
void tfd_fences_free(struct tfd_open *open);

/* numbers.c */
int tfd_numbers_take(struct tfd_numbers *numbers, uint32_t limit, void *item,
                     uint32_t *number); /* -ENOSPC, -ENOMEM */
void tfd_numbers_give(struct tfd_numbers *numbers, uint32_t number);

static inline void *tfd_numbers_get(const struct tfd_numbers *numbers, uint32_t number)
{
	return number < numbers->capacity ? numbers->items[number] : NULL;
}

/* channel_open.c: control */
int tfd_channel_open(struct tfd_conn *conn, struct tfd_error *error);
void tfd_channel_close(struct tfd_rail *rail, struct tfd_channel *channel); /* NULL-safe */
/* Those of a far half's address that are the provider's. */
size_t tfd_channel_address_bytes(size_t address_bytes);
/* channel_open.c: worker */
int tfd_channel_start(struct tfd_conn *conn, void *address, size_t *address_bytes, struct tfd_error *error);
int tfd_channel_join(struct tfd_conn *conn, const void *address, size_t *address_bytes,
                     struct tfd_error *error);

/* channel.c: worker */
void tfd_channel_stop(struct tfd_conn *conn, uint32_t detail,
                      const struct tfd_landed *far_landed); /* NULL: unknown */
bool tfd_channel_has_work(const struct tfd_conn *conn);
int tfd_channel_post(struct tfd_worker *worker, struct tfd_conn *conn, uint32_t *count);
void tfd_channel_arrived(struct tfd_worker *worker, const struct tfd_wc *wc);
void tfd_channel_wr_done(struct tfd_wr *wr, const struct tfd_wc *wc);
void tfd_channels_check(struct tfd_worker *worker);

/* For verify.c: where a free call's request goes, and its posting. */
struct tfd_frame *tfd_channel_frame(struct tfd_conn *conn, const struct tfd_call *call);
int tfd_channel_call(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_call *call,
                     struct tfd_shard *shard);

/* verify.c */
#define TFD_CHECK_BYTES (256u << 10)
bool tfd_verify_wanted(const struct tfd_shard *shard);
void tfd_verify_start(struct tfd_shard *shard); /* to be queued */
/* As tfd_provider_ops.post; -EBUSY: not in this pass. */
int tfd_verify_post(struct tfd_worker *worker, struct tfd_conn *conn, struct tfd_call *call,
                    struct tfd_shard *shard);
void tfd_verify_answered(struct tfd_shard *shard, const struct tfd_frame *answer);
void tfd_verify_lost(struct tfd_shard *shard, uint32_t detail);
void tfd_verify_answer(struct tfd_worker *worker, struct tfd_conn *conn, const struct tfd_frame *frame,
                       const uint8_t *payload, struct tfd_frame *answer);

/* crc32c.c */
void tfd_crc32c_init(void); /* before the first use; any number of times */
uint32_t tfd_crc32c(uint32_t crc, const void *bytes, size_t count); /* of none yet: 0 */
uint32_t tfd_crc32c_by_tables(uint32_t crc, const void *bytes, size_t count);

/* send.c */
int tfd_sender_take(struct tfd_worker *worker, struct tfd_open *open); /* -ENOSPC, -ENOMEM */
void tfd_sender_give(struct tfd_worker *worker, struct tfd_open *open);
void tfd_send_queue(struct tfd_shard *shard);
bool tfd_send_may_go(const struct tfd_open *open);
void tfd_send_park(struct tfd_shard *shard);
void tfd_send_unpark(struct tfd_open *open);
void tfd_send_fill(const struct tfd_shard *shard, struct tfd_frame *frame);
void tfd_send_posted(struct tfd_shard *shard, const struct tfd_conn *conn);
void tfd_send_answered(struct tfd_shard *shard, const struct tfd_frame *answer, uint32_t readies);
void tfd_send_lost(struct tfd_shard *shard, uint32_t detail, bool landed);
void tfd_send_ready(struct tfd_open *open);
void tfd_senders_conn_closed(struct tfd_worker *worker, const struct tfd_conn *conn);
void tfd_senders_check(struct tfd_worker *worker);

/* mailbox.c */
void tfd_mailbox_deliver(struct tfd_worker *worker, struct tfd_conn *conn, const struct tfd_frame *frame,
                         const uint8_t *payload, struct tfd_frame *answer);
uint32_t tfd_mailbox_release(struct tfd_session *session,
                             const struct tfd_entry *entry); /* enum tfd_detail */
void tfd_mailboxes_check(struct tfd_worker *worker);
void tfd_mailboxes_free(struct tfd_session *session, struct tfd_worker *worker); /* NULL: it has stopped */
void tfd_waiter_drop(struct tfd_waiter *waiter);

/* submit.c */
void tfd_tables_put(struct tfd_source *source, struct tfd_tables *tables);
void tfd_tables_free(struct tfd_source *source);

/* open.c */
void tfd_open_quiet_if_idle(struct tfd_open *open);
void tfd_open_cancel(struct tfd_open *open, const struct tfd_fence *fence, uint32_t detail); /* NULL: all */
void tfd_open_destroy(struct tfd_open *open);

/* region.c */
void tfd_region_destroy(struct tfd_region *region);
void tfd_region_unlink(struct tfd_region *region); /* worker: not to be found by its keys any more */
/* Worker. NULL: the session with that name space has none with that key. */
const struct tfd_region *tfd_region_find(const struct tfd_rail *rail, uint32_t name_space, uint64_t key);
bool tfd_region_probe(struct tfd_region *region); /* worker, after an error: whether its pages are gone */

/* guard.c */
int tfd_guard_install(void);
int tfd_guard_add(struct tfd_region *region);
void tfd_guard_remove(struct tfd_region *region);
uint32_t tfd_guard_hits(void); /* faults mended so far */
/* Of the region that has this address: not 0 once pages of it were mended; lives as long as that. NULL: no region's. */
const uint32_t *tfd_guard_flag(const void *address);

/* session.c */
struct tfd_session *tfd_session_get(struct tfd_core *core, uint64_t handle);
void tfd_session_put(struct tfd_session *session);
void tfd_session_quiet_if_idle(struct tfd_session *session);
void tfd_session_take_published(struct tfd_worker *worker, struct tfd_session *session);
void tfd_sessions_close_all(struct tfd_core *core);

/* heartbeat.c */
void tfd_heartbeat_close(struct tfd_core *core);
void tfd_heartbeat_touch(struct tfd_core *core);

/* A job that is refused, or stopped, for such a reason has lost its peer. */
static inline bool tfd_detail_is_loss(uint32_t detail)
{
	return detail == TFD_DETAIL_STALE || detail == TFD_DETAIL_CONNECTION ||
	       detail == TFD_DETAIL_HEARTBEAT;
}

/* wire immediate: [3: weight][9: name space][20: imm] */
/* Name space 0 is nobody's: what it carries goes from worker to worker. */
#define TFD_NAME_SPACE_WORKER 0u

static inline uint32_t tfd_wire_name_space(uint32_t wire)
{
	return wire >> TFD_IMM_BITS & (TFD_NAME_SPACES - 1);
}

static inline uint32_t tfd_wire_imm(uint32_t name_space, uint32_t imm)
{
	return name_space << TFD_IMM_BITS | imm;
}

/* The largest weight that is not above `units` eighths, which are not 0. */
static inline uint32_t tfd_weight_of(uint64_t units)
{
	if (units >= 64) {
		uint32_t power = (63 - (uint32_t)__builtin_clzll(units)) / 3; /* 64: 2, 512: 3, … */

		return power < 5 ? power + 2 : 7;
	}
	return units >= 8 ? 3 : 31 - (uint32_t)__builtin_clz((uint32_t)units);
}

/* Eighths of a write: 1/8 1/4 1/2 1 8 64 512 4096 */
static inline uint32_t tfd_weight_units(uint32_t weight)
{
	return weight < 4 ? 1u << weight : 8u << 3 * (weight - 3);
}

#endif
