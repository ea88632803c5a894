/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the staged rails of a domain group share: the pool with its slots, and the helpers of GPUs that copy between slots and memory
 * of theirs. Owner: the worker, but for opening and closing.
 */
#ifndef TFD_STAGES_H
#define TFD_STAGES_H

#include "../../core/parts.h"
#include "../provider.h"
#include "transferd/stage.h"

#define TFD_STAGES_PAYLOAD_BYTES (256u << 10) /* of a slot; README.md has what was measured */
#define TFD_STAGES_PARTS 256u                 /* further parts of one post */
#define TFD_STAGES_MEMORY_BUCKETS 256u

struct tfd_staged_part {
	uint64_t address;
	uint64_t length;
};

/* Before the payload, in each slot. */
#define TFD_STAGES_HEAD_BYTES (64u + TFD_STAGES_PARTS * sizeof(struct tfd_staged_part))
#define TFD_STAGES_SLOT_BYTES ((TFD_STAGES_HEAD_BYTES + TFD_STAGES_PAYLOAD_BYTES + 4095u) / 4096u * 4096u)

/* A part of the pool. */
struct tfd_stage_slot {
	struct tfd_list link; /* half->slots, half->own, or stages->free */
	struct tfd_half *half; /* whose it is; NULL: nobody's */
	bool used; /* something may be in it */
	struct tfd_wr wr; /* what the inner provider posts from it */
	bool posted; /* and has not given back */
	bool left; /* by its half: free once nothing is under way */
	uint32_t
		copies; /* requests of helpers under way from it or to it: its own half's, or the far one's */
	int error; /* of those that have failed; positive */
	uint64_t offset; /* constant; into the pool */
};

/* A request that was made of a helper. */
struct tfd_stage_request {
	struct tfd_stage_slot *slot; /* whose it is */
	struct tfd_stage_slot *place; /* from or to which it copies; in one pool the far half's */
};

struct tfd_stage_queue {
	uint64_t tail;
	uint64_t told; /* complete, and its slots know */
	struct tfd_stage_request requests[TFD_STAGE_ENTRIES];
};

struct tfd_stage_helper {
	struct tfd_list link;
	uint64_t name;
	struct tfd_stage *shared; /* owned, mapped */
	int wake_fd;
	struct tfd_stage_queue queues[TFD_STAGE_RINGS];
	uint64_t waits_ns; /* since when nothing has come back of what is under way; 0: nothing is */
	bool silent; /* and told so */
	struct tfd_stage_info info;
};

/* An allocation on a GPU that some region is in. */
struct tfd_stage_memory {
	struct tfd_list link;
	uint64_t number;
	struct tfd_stage_helper *helper; /* that has it open; NULL: none */
	bool wanted; /* control was told */
	bool failed; /* since somebody asked for it first: whoever waits is told */
};

struct tfd_stages {
	int pool_fd;
	uint8_t *pool; /* owned, mapped */
	uint64_t pool_bytes;
	struct tfd_stage_slot *slots; /* owned */
	uint32_t slot_count;
	uint32_t run_count; /* so many of them, the first, are for runs; the others for what is sent */
	uint32_t held; /* by runs */
	struct tfd_list free; /* for what is sent */
	struct tfd_list helpers;
	struct tfd_list memories[TFD_STAGES_MEMORY_BUCKETS];
	uint64_t last_name;
	uint32_t under_way; /* requests, of all helpers */
	/* Control is to be told: enum tfd_event_type and its id. NULL: nobody. */
	void (*tell)(void *context, uint32_t event, uint64_t id);
	void *context;
};

/* control, before the worker runs and after it has stopped */
int tfd_stages_open(uint64_t bytes, struct tfd_stages **out, struct tfd_error *error);
void tfd_stages_close(struct tfd_stages *stages);

/* control. Makes what is shared with a helper: two memfds and an eventfd, the caller's. */
int tfd_stage_helper_make(const struct tfd_stages *stages, uint64_t name, struct tfd_stage_helper **out,
                          struct tfd_stage_fds *fds, struct tfd_error *error);
void tfd_stage_helper_free(struct tfd_stage_helper *helper);

/* worker, by control's command */
void tfd_stage_helper_add(struct tfd_stages *stages, struct tfd_stage_helper *helper);
struct tfd_stage_helper *tfd_stage_helper_find(const struct tfd_stages *stages, uint64_t name);
/* Its process has ended: what is under way has failed. The caller frees it. */
void tfd_stage_helper_remove(struct tfd_stages *stages, struct tfd_stage_helper *helper);
/* `helper`: NULL: it cannot be opened. -ENOMEM. */
int tfd_stage_memory_tell(struct tfd_stages *stages, uint64_t number, struct tfd_stage_helper *helper);
void tfd_stage_memory_drop(struct tfd_stages *stages, uint64_t number); /* idempotent */

/*
 * worker. Gives a half a run of `least` to `most` slots, and the inner rail's registration is the caller's. What others had in them is gone.
 * false: there is no such run.
 */
bool tfd_stage_run_take(struct tfd_stages *stages, struct tfd_half *half, uint32_t least, uint32_t most);
/* Its run, and all it has: its inner half is gone, and with it what that had posted. Each is free once nothing is under way. */
void tfd_stage_slots_abandon(struct tfd_stages *stages, struct tfd_half *half);

/* worker, hot */
/* For a post of the half's: one of its run (`own`), or any. NULL: none is free. */
struct tfd_stage_slot *tfd_stage_slot_take(struct tfd_stages *stages, struct tfd_half *half, bool own);
void tfd_stage_slot_put(struct tfd_stages *stages, struct tfd_stage_slot *slot);
/* The inner provider has given it back. */
void tfd_stage_slot_posted(struct tfd_stages *stages, struct tfd_stage_slot *slot);

/* Which a byte of the pool is in. */
static inline struct tfd_stage_slot *tfd_stage_slot_of(const struct tfd_stages *stages, uint64_t offset)
{
	return &stages->slots[offset / TFD_STAGES_SLOT_BYTES];
}

static inline uint8_t *tfd_stage_slot_at(const struct tfd_stages *stages, const struct tfd_stage_slot *slot)
{
	return stages->pool + slot->offset;
}

/*
 * Whether a helper has a memory open: 0; -EBUSY: none has, which control was told; -EIO: it cannot be opened, and whoever asks has `waited`
 * for it, or its helper does nothing any more.
 */
int tfd_stages_ask(struct tfd_stages *stages, uint64_t memory, bool waited);
/* Requests copies between a slot and one memory, all or none. -EAGAIN: its ring is full; else as tfd_stages_ask. */
int tfd_stages_copy(struct tfd_stages *stages, uint32_t ring, struct tfd_stage_slot *slot,
                    const struct tfd_stage_copy *copies, uint32_t count, bool waited);
/* Takes in what helpers have done. */
void tfd_stages_poll(struct tfd_stages *stages);

#endif
