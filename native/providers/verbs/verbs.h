/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of this provider share. Everything here is the worker's, but where it says otherwise. */
#ifndef TFD_VERBS_H
#define TFD_VERBS_H

#include <pthread.h>
#include <stdbool.h>

#include "../../core/list.h"
#include "../provider.h"
#include "gid.h"
#include "loader.h"

#define TFD_VERBS_CHANNELS 3u    /* queue pairs of a half: one for each enum tfd_traffic */
#define TFD_VERBS_PARTS 16u      /* ranges of one post, each a work request */
#define TFD_VERBS_CHAIN 32u      /* work requests that wait to be handed to the device together */
#define TFD_VERBS_INLINE 64u     /* bytes that go in the work request itself, where the device can */
#define TFD_VERBS_BUCKETS 1024u  /* of queue pairs by number; a power of two */
#define TFD_VERBS_RECEIVES 8192u /* most that an SRQ is made for; a power of two */
#define TFD_VERBS_QUEUE_SENDS 512u /* work requests of a queue pair; a power of two */
#define TFD_VERBS_SENDS 16384u   /* most entries of the queue for what was posted */
#define TFD_VERBS_BATCH 32       /* completions read at once */

_Static_assert(TFD_VERBS_PARTS <= TFD_VERBS_CHAIN, "a post's requests are in one chain");

/* What the thread of events has to tell the worker. */
enum tfd_verbs_alarm {
	TFD_VERBS_GONE = 1u << 0,       /* the device was removed, or is dead */
	TFD_VERBS_OVERRUN = 1u << 1, /* a completion queue, or the SRQ, is in error: completions are lost */
	TFD_VERBS_SRQ_LOW = 1u << 2, /* fewer receives are left than can be by what was granted */
	TFD_VERBS_HALF_BROKE = 1u << 3, /* a queue pair, tfd_verbs_queue.broke */
};

/* Constant once the rail is open, but where it says otherwise. */
struct tfd_verbs_port {
	uint8_t number;
	uint8_t link_layer; /* IBV_LINK_LAYER_* */
	uint16_t pkey_index;
	uint16_t lid; /* InfiniBand; the worker's, as the next: when a half was made last */
	enum ibv_mtu mtu;
	bool global; /* packets carry a GRH: always on Ethernet; on ports that have no LID of their own, or as told */
	struct tfd_gid gid; /* on InfiniBand its address is the worker's, as `lid` */
	uint32_t gid_index; /* shared: where it is now; the thread of events stores it */
	uint32_t max_message_bytes;
};

/* A post that was not reported yet. */
struct tfd_verbs_posted {
	struct tfd_wr *wr;
	uint32_t requests_end; /* number of the work request after its last, of the queue pair */
	uint32_t requests;
};

/*
 * A queue pair of a half. Posts are numbered; head <= done <= tail:
 *
 *   head..done  their fate is known and has to be reported
 *   done..tail  the device has them, or they wait in the chain
 */
struct tfd_verbs_queue {
	struct ibv_qp *qp; /* owned */
	struct ibv_qp_ex *extended; /* the same; NULL: by ibv_post_send */
	struct tfd_half *half;
	struct tfd_verbs_queue *next; /* in its bucket */
	uint32_t number; /* of the queue pair */
	uint32_t generation; /* numbers are used again, this is not */
	uint32_t psn; /* of the first packet that it sends; random */
	bool receives; /* it was joined: the device may take receives of the SRQ for it */
	uint32_t traffic; /* enum tfd_traffic */
	uint32_t inline_bytes;
	uint32_t head, done, tail;
	uint32_t size; /* of `posted`; a power of two, and the most work requests */
	struct tfd_verbs_posted *posted; /* owned */
	uint32_t requests_posted, requests_done; /* work requests */
	struct ibv_send_wr *first, *last; /* the chain that waits */
	struct tfd_list chain_link; /* domain->chains, while it has one */
	struct tfd_list report_link; /* domain->reports, while head is not done */
	bool failed;
	uint32_t failed_at; /* the first post that failed, with `error`; later ones were flushed */
	int32_t error;
	uint32_t remote_access;
	bool refused;
	uint32_t refused_at; /* the first post that the device did not take, as none after it */
	uint32_t
		broke; /* shared: by itself, as the thread of events has heard; or it has refused something */
	uint32_t
		last_wqe; /* shared: broken, and done with all receives that it took, as the thread has heard */
};

struct tfd_half {
	struct tfd_domain *domain;
	void *owner;
	struct tfd_list link; /* domain->halves, at last the reaper's */
	struct tfd_verbs_queue queues[TFD_VERBS_CHANNELS]; /* by enum tfd_traffic */
	enum ibv_mtu mtu; /* that it told */
	bool started;
	bool closed;
	bool stopped; /* the device does nothing for it any more */
	bool told; /* that it broke by itself */
	bool uncounted; /* closed: immediates of it may be lost, which was not told yet */
	uint64_t deadline_ns; /* closed: until when its posts have to be flushed */
	uint64_t last_deadline_ns; /* closed: until when its queues have to be done with their receives */
};

/* An immediate that was taken out of the device's queue while there was nobody to take it. */
struct tfd_verbs_stashed {
	void *owner;
	uint32_t imm;
	uint32_t order;
};

struct tfd_mr {
	struct tfd_list link; /* domain->mrs */
	struct ibv_mr *mr; /* NULL: the device is gone */
	bool foreign; /* a device's: the processor cannot read it */
};

/* The thread that destroys queue pairs, reaper.c. */
struct tfd_verbs_reaper {
	pthread_t thread;
	bool runs;
	pthread_mutex_t lock; /* guards the next two, for a moment each */
	struct tfd_list halves; /* tfd_half.link: stopped and forgotten */
	bool stops;
	pthread_cond_t some;
	uint32_t pending; /* shared: halves whose queue pairs there are still */
};

/* A rail. */
struct tfd_domain {
	const struct tfd_verbs_library *library; /* constant, as all down to `thread` */
	struct tfd_verbs_options options;
	struct ibv_context *context;
	struct ibv_device_attr attributes;
	struct tfd_verbs_port port;
	char protocol[TFD_NAME_MAX];
	struct ibv_pd *pd;
	struct ibv_comp_channel *channel;
	int stop_fd, wake_fd; /* eventfds: ends the thread of events; wakes the worker */
	int epoll_fd; /* of wake_fd and the channel's */
	pthread_t thread; /* of events */
	bool thread_runs;
	struct tfd_verbs_reaper reaper;
	uint32_t state; /* shared: enum tfd_rail_state */
	uint32_t alarms; /* shared: enum tfd_verbs_alarm */
	uint32_t lasts; /* shared, a futex: how often tfd_verbs_queue.last_wqe was heard */
	uint32_t lasts_missed; /* shared, the worker's: it was waited for in vain */
	uint32_t quiet; /* shared: the worker touches no object of the device any more, which is gone */
	pthread_rwlock_t
		device_lock; /* the objects of the device: who uses them in a control thread reads, who lets go of them writes */
	pthread_mutex_t mrs_lock; /* guards `mrs` */
	struct tfd_list mrs;

	struct ibv_cq *send_cq; /* these three are made anew after an overrun */
	struct ibv_cq *recv_cq;
	struct ibv_srq *srq;

	struct tfd_list halves;
	struct tfd_verbs_queue *buckets[TFD_VERBS_BUCKETS];
	uint32_t last_generation;

	/* what is posted */
	struct tfd_list chains; /* queues with a chain that waits */
	struct tfd_list reports; /* queues with posts to report */
	uint32_t chained; /* of `requests` and `pieces`, in use */
	uint32_t sends; /* entries of send_cq */
	uint32_t send_room; /* those that no work request in flight may need */
	struct ibv_send_wr requests[TFD_VERBS_CHAIN];
	struct ibv_sge pieces[TFD_VERBS_CHAIN];

	/* what arrives */
	uint32_t receives; /* of the SRQ */
	uint32_t receive_batch; /* so many are posted again at once */
	uint32_t receives_used;
	struct ibv_recv_wr *receive_chain; /* owned; receive_batch of them */
	struct tfd_verbs_stashed *stash; /* owned; as many as the SRQ has */
	uint32_t stash_head, stash_tail;
	bool imms_first; /* whose turn it is in poll */
	uint32_t events_unacked[2]; /* of send_cq, recv_cq */
	uint32_t alarmed; /* what was taken of `alarms` and not told yet */
	bool dead; /* the device is gone */
	bool overrun; /* the queues are made anew once no half has them */
};

static inline struct tfd_verbs_queue *tfd_verbs_queue_find(const struct tfd_domain *domain, uint32_t number)
{
	struct tfd_verbs_queue *queue = domain->buckets[number & (TFD_VERBS_BUCKETS - 1)];

	while (queue && queue->number != number)
		queue = queue->next;
	return queue;
}

/* device.c; control */
int tfd_verbs_device_open(struct tfd_domain *domain, const struct tfd_group_options *options,
                          const char *name, struct tfd_rail_info *info, struct tfd_error *error);

/* ibv_query_port(3); any thread. */
int tfd_verbs_port_query(const struct tfd_domain *domain, uint8_t number, struct ibv_port_attr *out);

/*
 * worker, or nobody else yet. What the port has now: a subnet manager gives it a LID when it comes up, and its interface's MTU may be changed
 * at any time, of which no event tells.
 */
void tfd_verbs_port_take(struct tfd_domain *domain, const struct ibv_port_attr *now);

/* worker. What a subnet manager has made of the GID with the index that was told. -ENOENT: there is none at present. */
int tfd_verbs_gid_take(struct tfd_domain *domain);

/* Where the port's GID is in its table, or -ENOENT; any thread. */
int tfd_verbs_gid_find(const struct tfd_domain *domain);

/* domain.c; control, or the thread of events once the worker is quiet. Lets go of the device, with all memory. */
void tfd_verbs_device_release(struct tfd_domain *domain);

/* domain.c; worker. Makes the queues anew after an overrun. -EAGAIN: halves have them still. */
int tfd_verbs_queues_renew(struct tfd_domain *domain, struct tfd_error *error);

/* memory.c; control */
int tfd_verbs_mr_open(struct tfd_domain *domain, void *address, size_t length, uint32_t access,
                      struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error);
int tfd_verbs_mr_open_dmabuf(struct tfd_domain *domain, const struct tfd_dmabuf *dmabuf, int writable,
                             struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error);
void tfd_verbs_mr_close(struct tfd_domain *domain, struct tfd_mr *mr);

/* half.c */
int tfd_verbs_half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                        void *address, size_t *address_bytes, struct tfd_error *error);
/* control */
int tfd_verbs_reach(struct tfd_domain *domain, const void *address, size_t address_bytes,
                    struct tfd_error *error);
int tfd_verbs_half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                         struct tfd_error *error);
void tfd_verbs_half_close(struct tfd_half *half);
int tfd_verbs_half_settle(struct tfd_half *half); /* control */
int tfd_verbs_half_drain(struct tfd_half *half, struct tfd_wc *wc, int max);
void tfd_verbs_half_free(struct tfd_half *half);

/* reaper.c; control */
int tfd_verbs_reaper_open(struct tfd_domain *domain, struct tfd_error *error);
void tfd_verbs_reaper_close(struct tfd_domain *domain); /* once all it was given is destroyed */
/* reaper.c; worker. Destroys the queue pairs of a half that is stopped, and frees it, some time. */
void tfd_verbs_reap(struct tfd_half *half);
bool tfd_verbs_reap_wait(const struct tfd_domain *domain); /* whether all of them are, within a moment */
bool tfd_verbs_reaped(const struct tfd_domain *domain); /* any thread. Whether all of them are */

/* events.c; control, but for the last three */
int tfd_verbs_events_open(struct tfd_domain *domain, struct tfd_error *error);
void tfd_verbs_events_close(struct tfd_domain *domain);
/* An alarm when there are fewer receives than there can be. */
void tfd_verbs_srq_watch(struct tfd_domain *domain);
/* The device is gone: if no half is left the worker needs nothing of it any more. */
void tfd_verbs_quiet_renew(struct tfd_domain *domain);
/* Does what the alarms ask for, and tells of them. */
int tfd_verbs_alarms_take(struct tfd_domain *domain, struct tfd_wc *wc, int max);

/* post.c */
int tfd_verbs_post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr);
/* Hands all chains to the device. */
void tfd_verbs_chains_send(struct tfd_domain *domain);
/* The device takes no more of this queue: what is in flight on it has failed. */
void tfd_verbs_queue_fail(struct tfd_verbs_queue *queue, int error);

/* poll.c */
int tfd_verbs_poll(struct tfd_domain *domain, struct tfd_wc *wc, int max);
int tfd_verbs_arm(struct tfd_domain *domain);
/* Takes all that the device has completed: whether there was anything. */
bool tfd_verbs_take(struct tfd_domain *domain);
/* Nobody is told of its immediates any more. */
void tfd_verbs_forget(struct tfd_half *half);
/* A batch of receive work requests. */
int tfd_verbs_receives_post(struct tfd_domain *domain);
/* Acknowledges the completion events that were read: their queues cannot be destroyed before. */
void tfd_verbs_cq_events_ack(struct tfd_domain *domain);

#endif
