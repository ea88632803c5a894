/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A provider: one NIC dialect behind one table. A *domain* is one rail opened; a *connection* is one half of a
 * (local rail, remote rail, direction) pair. Every op says who calls it:
 *
 *   control   any control thread, several at once; may block
 *   worker    the one worker thread that owns the domain; must not block, allocate, lock or log
 *
 * Return 0 or -errno unless stated. Out-parameters are untouched on failure.
 */
#ifndef TFD_PROVIDER_H
#define TFD_PROVIDER_H

#include <stddef.h>
#include <stdint.h>

#include "transferd/core.h"

struct tfd_domain; /* a provider's own, per rail */
struct tfd_mr;     /* registered memory on one domain */
struct tfd_half;   /* a provider's half of a connection */

#define TFD_WR_CONTEXT_WORDS 8

/* A posted piece. The core owns it from post to completion; `context` is the provider's to use meanwhile. */
struct tfd_wr {
	uint64_t context[TFD_WR_CONTEXT_WORDS];
	struct tfd_wr *next; /* free list, or outstanding list of its connection */
	struct tfd_wr *prev;
	struct tfd_conn *conn;
	struct tfd_job *job;
	struct tfd_shard *shard; /* of the job, or NULL with it */
	uint32_t message; /* of a connection's own: its immediate */
	uint32_t back; /* the provider has done with it; its fate is not known yet */
	uint32_t refused; /* with it: the far side refused it, unless it was dying */
	uint32_t units; /* eighths of a write that its immediate counts */
	uint32_t credit; /* of a message: its immediate has taken one; others do if they count */
	uint64_t extent; /* of its shard: bytes, or pages */
	uint64_t length;
	uint64_t posted_ns;
	uint64_t ahead; /* in flight on the connection when it was posted, with it */
	uint64_t imm_number; /* its immediate's on the connection, or the next one's */
};

/* What a post belongs to. A provider may keep each on a queue pair of its own (info.channels). */
enum tfd_traffic {
	TFD_TRAFFIC_BULK = 0, /* as TFD_PRIORITY_BULK */
	TFD_TRAFFIC_LATENCY = 1, /* as TFD_PRIORITY_LATENCY */
	TFD_TRAFFIC_MESSAGE = 2, /* of the connection's own */
};

/* A further part of a post: under its mr and remote_key. */
struct tfd_post_part {
	const void *local; /* borrowed until the completion */
	uint64_t remote_address;
	uint64_t length; /* not 0 */
};

/* What a post has waited for, if it goes again. */
enum tfd_waited {
	TFD_WAITED_NOT = 0,
	TFD_WAITED_NEAR = 1, /* its own memory: post said -EBUSY */
	TFD_WAITED_FAR = 2, /* the far side's: it came back as TFD_WC_NOT_OPEN */
};

struct tfd_post {
	const void *local; /* borrowed until the completion */
	struct tfd_mr *mr; /* covers local; NULL when length is 0 */
	uint64_t length;
	uint64_t remote_address;
	uint64_t remote_key;
	uint64_t job_bytes; /* of all that it is a part of; a hint, 0: not known */
	uint64_t
		chain; /* what it is a part of: no immediate of that may be told behind a part that failed alone; 0: nothing */
	uint32_t has_imm;
	uint32_t imm;
	uint32_t traffic; /* enum tfd_traffic */
	uint32_t waited; /* enum tfd_waited */
	uint32_t read; /* not 0: from the remote range into `local`; no immediate */
	uint32_t
		part_count; /* further parts, less than info.max_parts, of a read 0; the immediate counts after all of them */
	const struct tfd_post_part
		*parts; /* borrowed during the call; all that they carry together is at most
	                                      info.max_message_bytes */
};

/* Memory of a device, or of whoever exports it (dma-buf). */
struct tfd_dmabuf {
	int fd; /* stays the caller's */
	uint64_t offset; /* into it */
	uint64_t length;
	uint64_t address; /* what it is called in posts, at both ends; as far into its page as `offset` */
};

/* Memory of a device that a helper process can copy (providers/staged). */
struct tfd_device_memory {
	uint64_t number; /* that control gave its allocation; not 0 */
	uint64_t offset; /* into that */
	uint64_t length;
	uint64_t address; /* what it is called in posts at this end */
};

/* What the far side may do with registered memory whose key it has: read it, or as these say. */
#define TFD_MR_WRITABLE 1u
#define TFD_MR_UNREADABLE 2u

enum tfd_wc_type {
	TFD_WC_SENT = 1, /* wr: acknowledged: its bytes are visible at the far side */
	/*
	 * wr, error: it failed. NULL wr: an error of the domain's own, which is counted, and means by `error`:
	 *
	 *   EOVERFLOW  completions were lost, of the half of `owner`, or (NULL) of all
	 *   ENODEV     owner NULL: the rail's device is gone (rail_state says so, too): none of its halves carries anything any more
	 *   any other  the half of `owner` is broken, of which nothing need be posted; NULL: nobody is
	 *
	 * What a half has posted is told one by one all the same, at the latest when it is closed and drained.
	 */
	TFD_WC_ERROR = 2,
	TFD_WC_IMM = 3, /* imm: an immediate arrived, the bytes before it (on its channel) are visible */
	/*
	 * wr: memory at the far side is not open yet. Nothing of it has landed, nor has what was posted behind it of its chain, which comes back
	 * like this, too. It may go again after a while, as another chain.
	 */
	TFD_WC_NOT_OPEN = 4,
	/*
	 * owner: a post to its half has failed alone, or came too early, and was answered so. imm: not 0: it had an immediate, which is not told. Its
	 * sender knows at the latest when it has posted TFD_VOID_POSTS more.
	 */
	TFD_WC_VOID = 5,
};

#define TFD_VOID_POSTS 16u

struct tfd_wc {
	uint32_t type;
	uint32_t imm;
	struct tfd_wr *wr;
	int32_t error; /* positive errno */
	uint32_t remote_access; /* error: the far side refused the key or the range */
	uint32_t alone; /* error: of this piece, and its chain; its half goes on */
	uint32_t
		unsure; /* remote_access: it was a device that refused; the kernel may be clearing away after its daemon */
	uint32_t
		order; /* TFD_WC_IMM: enum tfd_traffic of the channel that it came by, where info.channels is 3; else 0 */
	void *owner; /* TFD_WC_IMM, TFD_WC_ERROR: of the half that it came by, or is about; NULL where the provider cannot tell */
};

struct tfd_provider_ops {
	const char *name;
	uint32_t path_id; /* TFD_PATH_* */

	/* control. Opens rail `name`; fills info's constant fields. */
	int (*domain_open)(const struct tfd_group_options *options, const char *name,
	                   struct tfd_rail_info *info, struct tfd_domain **out, struct tfd_error *error);
	/* control, once the worker has stopped. NULL-safe. */
	void (*domain_close)(struct tfd_domain *domain);

	/*
	 * control; worker, where half_open may be called. Registers [address, address + length) as source of posts, and for the far side as
	 * `access` says (TFD_MR_*).
	 */
	int (*mr_open)(struct tfd_domain *domain, void *address, size_t length, uint32_t access,
	               struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error);
	/* control. Memory that the processor need not reach; the far side may read it. NULL: the provider has none. */
	int (*mr_open_dmabuf)(struct tfd_domain *domain, const struct tfd_dmabuf *dmabuf, int writable,
	                      struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error);
	/* control. The same by the number of its allocation; it need not be open anywhere yet. NULL: the provider has none. */
	int (*mr_open_device)(struct tfd_domain *domain, const struct tfd_device_memory *memory, int writable,
	                      struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error);
	/* control; worker, where half_free may be called. The caller has seen to it that no post and no far side uses it. */
	void (*mr_close)(struct tfd_domain *domain, struct tfd_mr *mr);

	/*
	 * worker. Makes a half and tells its address (at most TFD_ADDRESS_MAX bytes). May allocate. Both halves of a connection
	 * may post to each other: the incoming one answers messages. `owner` is what the immediates that come by it name.
	 */
	int (*half_open)(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
	                 void *address, size_t *address_bytes, struct tfd_error *error);
	/*
	 * control; may block for a second or so. Before half_start: finds the far half, of which that is the address, so that half_start need
	 * not. Errors as half_start's, and those of the network. NULL: there is nothing to find.
	 */
	int (*reach)(struct tfd_domain *domain, const void *address, size_t address_bytes,
	             struct tfd_error *error);
	/* worker. Joins it to the far half. -EPROTO: not an address of ours. May allocate. */
	int (*half_start)(struct tfd_half *half, const void *address, size_t address_bytes,
	                  struct tfd_error *error);
	/*
	 * worker. Nothing is sent by it any more, and nothing that comes is taken. May block for a moment. Once half_settle (where there is one)
	 * has said 0, too, no byte can land by this half; once its completions are drained as well, no posted wr of it is referenced by
	 * the provider and none of its memory is read.
	 */
	void (*half_close)(struct tfd_half *half);
	/*
	 * control; may block for a second or so. Of a half that was closed: until its device has done with it, or will not say so, so that
	 * half_drain need not wait for that. The worker polls meanwhile. -EAGAIN: bytes may land yet, or be read, as somebody copies them;
	 * it is asked again, and the half neither drained nor freed before it has said 0. NULL: there is nothing to wait for.
	 */
	int (*half_settle)(struct tfd_half *half);
	/* worker. Polls the queue that a closed half's completions are in, others' perhaps among them; 0: it is empty. */
	int (*half_drain)(struct tfd_half *half, struct tfd_wc *wc, int max);
	/* worker. Frees a closed half. */
	void (*half_free)(struct tfd_half *half);

	/*
	 * worker, hot. -EAGAIN: try after a poll. -EBUSY: its memory is not open yet, which concerns nobody else: try after a while. Anything
	 * else: the connection is broken.
	 */
	int (*post)(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr);
	/* worker, hot. Fills up to `max`; returns how many. What was posted before is on its way at the latest when it is called. */
	int (*poll)(struct tfd_domain *domain, struct tfd_wc *wc, int max);

	/*
	 * any thread; must not block. enum tfd_rail_state; GONE stays. NULL: it is up for as long as it is open. A rail that is gone
	 * still takes every op: halves are closed, memory is given back; new ones of either are refused (-ENODEV).
	 */
	uint32_t (*rail_state)(const struct tfd_domain *domain);

	/* control. fd that becomes readable when poll may have work after arm() said 0; -1: none, poll by time. */
	int (*wait_fd)(struct tfd_domain *domain);
	/* worker. 0: the fd tells; -EAGAIN: poll first. */
	int (*arm)(struct tfd_domain *domain);
};

const struct tfd_provider_ops *tfd_provider_find(const char *name);

extern const struct tfd_provider_ops tfd_libfabric_ops;
extern const struct tfd_provider_ops tfd_local_ops;
extern const struct tfd_provider_ops tfd_sim_ops;
extern const struct tfd_provider_ops tfd_staged_ops;
extern const struct tfd_provider_ops tfd_tcp_ops;
extern const struct tfd_provider_ops tfd_verbs_ops;

#endif
