/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The double's own structures. Locks, in the order in which they are taken:
 *
 *   fabric.next, fabric.lock   all tables, states of queue pairs, and every byte that is carried: whoever has it carries, or nobody does
 *   engine.lock                which queue pairs have something to carry
 *   cq->lock                   a completion queue's ring
 *   qp->lock                   a send queue's ring; what a post looks at
 *   srq->lock                  a shared receive queue's ring
 *   soft_inbox.lock            events waiting to be read
 *
 * A post takes qp->lock alone, a poll cq->lock and qp->lock, so that threads of the provider are ordered by as little of ours as by a device.
 */
#ifndef SOFT_H
#define SOFT_H

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdint.h>

#include "softverbs.h"

#define SOFT_EXPORT __attribute__((visibility("default")))

#define SOFT_DEVICES 8u
#define SOFT_PORTS 2u
#define SOFT_GIDS 16u
#define SOFT_PKEYS 4u
#define SOFT_SGES 16u
#define SOFT_INLINE 256u
#define SOFT_QPS 8192u
#define SOFT_MRS 8192u
#define SOFT_UNWRITTEN 16u
#define SOFT_NEVER UINT64_MAX

enum soft_mode {
	SOFT_THREADED, /* a thread carries */
	SOFT_INLINE_MODE, /* whoever posts carries */
	SOFT_NULL, /* nothing is carried, posts complete; for one thread */
};

struct soft_gid {
	union ibv_gid gid;
	uint32_t type; /* enum ibv_gid_type */
	uint32_t used;
};

struct soft_config {
	enum soft_mode mode;
	uint32_t devices;
	uint32_t ports;
	uint32_t extended;
	uint32_t infiniband; /* link layer */
	uint32_t grh; /* its ports say that they have to have one, and have no LIDs */
	uint32_t dmabuf;
	uint32_t max_qp;
	uint32_t max_qp_wr;
	uint32_t max_sge;
	uint32_t max_inline;
	uint32_t max_cqe;
	uint32_t max_srq_wr;
	uint32_t max_rd_atomic;
	uint32_t mtu; /* enum ibv_mtu */
	uint32_t hurry; /* timeouts are so many times shorter */
	uint32_t last; /* whether "last WQE reached" is told */
	uint32_t last_us; /* how long after a queue pair broke */
	uint32_t vendor;
	char gids[128];
	uint64_t memlock;
};

struct soft_port {
	uint32_t up;
	uint16_t lid;
	uint32_t mtu; /* enum ibv_mtu */
	uint16_t pkeys[SOFT_PKEYS];
	struct soft_gid gids[SOFT_GIDS];
};

/* fabric.lock, but for the counts, which are added to by anybody. */
struct soft_device {
	struct ibv_device device; /* first */
	struct soft_port ports[SOFT_PORTS];
	uint32_t removed;
	uint32_t cut;
	uint32_t held;
	uint32_t overrun[2]; /* of the next completion of a send, a receive queue */
	uint32_t fail_after; /* 0: nothing is to fail; else the so manieth */
	int fail_status;
	uint32_t unacked_after; /* as fail_after */
	uint32_t late; /* immediates whose completions wait until their queue pair breaks */
	uint32_t last_held; /* "last WQE reached" waits */
	struct softverbs_counts counts;
};

/* Events to be read at an fd. */
struct soft_inbox {
	pthread_mutex_t lock;
	int fd; /* an eventfd, a semaphore */
	struct soft_event *first;
	struct soft_event **last;
};

struct soft_event {
	struct soft_event *next;
	void *about; /* the object; NULL: a port or a device, or the object is gone */
	struct ibv_async_event event;
};

struct soft_context {
	struct verbs_context verbs; /* first, as any driver's */
	struct soft_device *device;
	struct soft_context *next;
	struct soft_inbox events;
	uint32_t gone; /* its device was removed: fabric.lock; every verb looks at it */
	uint32_t objects; /* fabric.lock */
};

struct soft_pd {
	struct ibv_pd pd; /* first */
	uint32_t users;
};

struct soft_mr {
	struct ibv_mr mr; /* first */
	struct soft_device *device;
	uint64_t iova;
	uint8_t *memory; /* of what is at iova */
	void *mapping; /* of a dmabuf: ours */
	size_t mapping_bytes;
	uint32_t access;
};

struct soft_channel {
	struct ibv_comp_channel channel; /* first */
	struct soft_inbox events;
};

struct soft_cqe {
	struct ibv_wc wc;
	struct soft_qp *qp;
	uint32_t receive;
	uint32_t freed; /* of a send: its queue is free up to here */
};

struct soft_cq {
	struct ibv_cq cq; /* first */
	struct soft_context *context;
	pthread_mutex_t lock;
	struct soft_cqe *ring;
	uint32_t size;
	uint32_t head;
	uint32_t tail;
	uint32_t armed; /* 1: for any, 2: for solicited ones and errors */
	uint32_t overrun;
	uint32_t told; /* completion events that were read */
	uint32_t async_told;
	uint32_t users; /* fabric.lock */
};

struct soft_recv {
	uint64_t wr_id;
};

struct soft_srq {
	struct ibv_srq srq; /* first */
	struct soft_context *context;
	pthread_mutex_t lock;
	struct soft_recv *ring;
	uint32_t size;
	uint32_t head;
	uint32_t tail;
	uint32_t unpolled; /* taken, their completions are not polled yet */
	uint32_t limit;
	uint32_t async_told;
	uint32_t users; /* fabric.lock */
};

struct soft_wqe {
	uint64_t wr_id;
	uint64_t remote_address;
	uint64_t due_ns;
	uint32_t remote_key;
	uint32_t opcode;
	uint32_t flags;
	__be32 imm;
	uint32_t sge_count;
	uint32_t inline_bytes;
	union {
		struct ibv_sge sges[SOFT_SGES];
		uint8_t bytes[SOFT_INLINE];
	};
};

struct soft_qp {
	struct ibv_qp_ex ex; /* first */
	struct soft_context *context;
	struct ibv_qp_attr attr;
	struct ibv_qp_cap cap;
	uint32_t number;
	uint32_t signal_all;
	uint64_t send_ops;
	pthread_mutex_t lock;
	enum ibv_qp_state state; /* written with fabric.lock and lock */
	struct soft_wqe *ring;
	uint32_t freed; /* lock: below it slots may be used again */
	uint32_t head; /* fabric.lock: the next to carry */
	uint32_t tail; /* lock: the next to post */
	/* Being built by ibv_wr_ functions, from wr_start on, in which `lock` is held. */
	uint32_t building;
	uint32_t built_tail;
	int built_error;
	/* Carrying; fabric.lock. */
	uint64_t due_ns; /* not before */
	uint32_t timeouts; /* of the work request at head */
	uint32_t rnr;
	uint32_t parked; /* inline: waits for a receive */
	/* Completions of receives that it has taken, which are not in the queue yet; last.c. */
	struct soft_cqe unwritten[SOFT_UNWRITTEN];
	uint32_t unwritten_count;
	uint32_t last_told; /* in ERR */
	uint64_t last_ns; /* not before */
	/* engine.lock */
	uint32_t queued;
	struct soft_qp *next_queued;
	uint32_t async_told;
};

struct soft_fabric {
	pthread_mutex_t next;
	pthread_mutex_t lock;
	uint32_t configured;
	struct soft_config config;
	struct soft_device devices[SOFT_DEVICES];
	struct soft_context *contexts;
	struct soft_qp *qps[SOFT_QPS];
	uint8_t qp_lives[SOFT_QPS];
	uint32_t qp_hand;
	struct soft_mr *mrs[SOFT_MRS];
	uint8_t mr_lives[SOFT_MRS];
	uint32_t mr_hand;
	uint64_t registered;
	uint32_t parked; /* fabric.lock; polls look at it */
	uint64_t delay_ns; /* posts look at it */
};

extern struct soft_fabric fabric;

/* Any lock; what it guards is changed by nobody else. Fair: who asked first has it first. */
void soft_lock(void);
void soft_unlock(void);
/* fabric.lock: reads the configuration unless that was done. */
void soft_configure_once(void);
int soft_gid_parse(const char *word, uint32_t device, uint32_t port, struct soft_gid *out);
struct soft_device *soft_device_find(const char *name);
uint64_t soft_now_ns(void);

/* Says what was wrong, and ends the program: what a real library would let pass, or crash on. */
_Noreturn void soft_abort(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Says why a verb refuses; returns `error`, which errno is then, too. */
int soft_refuse(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Whether a verb has to fail, as a test ordered or because its device is gone: an errno, which errno is then, too. */
int soft_fails(const struct soft_context *context, const char *verb);

static inline struct soft_context *soft_context_of(struct ibv_context *context)
{
	return (struct soft_context *)verbs_get_ctx(context);
}

/* events.c */
int soft_inbox_open(struct soft_inbox *inbox);
void soft_inbox_close(struct soft_inbox *inbox);
void soft_inbox_put(struct soft_inbox *inbox, const struct ibv_async_event *event, void *about);
/* Nobody will read of it any more. */
void soft_inbox_forget(struct soft_inbox *inbox, const void *about);
/* About a cq, qp or srq; of a port with `about` NULL. */
void soft_raise(struct soft_context *context, enum ibv_event_type type, void *about, uint32_t port);
/* Waits until *done is `told`: as destroying does, but not for ever. */
void soft_await_acks(pthread_mutex_t *mutex, pthread_cond_t *cond, const uint32_t *done, uint32_t told,
                     const char *what);

/* memory.c: the bytes of a range under a key, or NULL. fabric.lock. */
uint8_t *soft_bytes(const struct ibv_pd *pd, uint32_t key, uint64_t address, uint64_t length,
                    uint32_t access);

/* cq.c: fabric.lock, or the null mode. 0, or -1: it overran. */
int soft_cq_push(struct soft_cq *cq, const struct soft_cqe *cqe, int solicited);
void soft_cq_clean(struct soft_cq *cq, const struct soft_qp *qp); /* receives in it are lost */
int soft_cq_poll(struct ibv_cq *cq, int count, struct ibv_wc *wc);
int soft_cq_arm(struct ibv_cq *cq, int solicited_only);

/* srq.c */
int soft_srq_take(struct soft_srq *srq, uint64_t *wr_id); /* -1: it is empty */
void soft_srq_polled(struct soft_srq *srq);
int soft_srq_post(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);

/* last.c: fabric.lock, all. It goes into ERR; soft_last_tell is called until it has done it all. Whether anything was done. */
void soft_last_begin(struct soft_qp *qp);
int soft_last_tell(struct soft_qp *qp);
/* Whether this completion waits with the others. */
int soft_last_keep(struct soft_qp *qp, const struct soft_cqe *cqe);
/* It ends: what is not in the queue will never be. */
void soft_last_forget(struct soft_qp *qp);

/* path.c: fabric.lock. An errno. */
int soft_path_check(const struct soft_device *device, const struct ibv_ah_attr *path);

/* qp.c */
struct ibv_qp *soft_qp_create_ex(struct ibv_context *context, struct ibv_qp_init_attr_ex *attr);
/* fabric.lock: it goes into ERR by itself; `event` of it, -1: none. */
void soft_qp_break(struct soft_qp *qp, int event);
struct soft_qp *soft_qp_find(uint32_t number);

/* post.c and null.c */
int soft_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
void soft_post_extend(struct soft_qp *qp);
int soft_null_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
int soft_null_poll(struct ibv_cq *cq, int count, struct ibv_wc *wc);
int soft_null_srq_post(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
void soft_null_extend(struct soft_qp *qp);

/* carry.c: fabric.lock. Carries one work request; whether anything was done. */
int soft_carry(struct soft_qp *qp);

/* engine.c */
void soft_engine_start(void);
void soft_engine_stop(void);
void soft_kick(struct soft_qp *qp); /* it has something to carry */
void soft_kick_locked(struct soft_qp *qp); /* fabric.lock */
void soft_unqueue(struct soft_qp *qp); /* fabric.lock */
void soft_unpark(
	const struct soft_cq *cq); /* inline: those whose completions go to it, or with NULL all, try again */

#endif
