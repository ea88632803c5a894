/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Staging: a rail over another one, the *inner* rail, which has registered nothing but the pool. Bytes go from memory into a slot, by
 * the inner rail into a slot of the far half's, and from there into memory; where that is a GPU's its helper copies, else the worker.
 *
 * A far half lets us have as many posts under way as it has slots. Post n goes into slot n modulo their number, so that what has been
 * told of is told in order, whatever order the inner rail keeps, or helpers of several GPUs.
 */
#ifndef TFD_STAGED_H
#define TFD_STAGED_H

#include "../memory.h"
#include "stages.h"

#define TFD_STAGED_SLOTS 16u /* that a half is written to, at most */
#define TFD_STAGED_OWN 8u /* for its own posts, at most */

enum tfd_staged_status {
	TFD_STAGED_OK = 0,
	TFD_STAGED_REFUSED = 1, /* no such key, bounds, rights */
	TFD_STAGED_FAILED = 2, /* its helper could not copy: it alone */
	TFD_STAGED_NOT_OPEN = 3, /* its memory is not open yet: it is to come again */
};

/*
 * Immediates of the inner rail: [3: kind][4: slot][9: check][16: number]. The number is the far half's, the check nine bits of its
 * token; `slot` one of the half's that takes the post. Kind 0 brings a post, the others end it with an enum tfd_staged_status.
 */
enum tfd_staged_kind { TFD_STAGED_POST = 0, TFD_STAGED_ENDED = 1 /* and the status */ };

#define TFD_STAGED_READ 1u
#define TFD_STAGED_HAS_IMM 2u
#define TFD_STAGED_VOID 4u /* it has failed at the sender's: nothing lands, no immediate is told */
#define TFD_STAGED_WAITED 8u /* it comes again after NOT_OPEN */

/* At the beginning of a slot; then parts; then, at a multiple of TFD_LINE, the payload. Little-endian, as are all hosts. */
struct tfd_staged_header {
	uint64_t token; /* of the half that it is for */
	uint64_t number; /* of the post, from 0 */
	uint64_t key; /* 0: it has no bytes */
	uint64_t address;
	uint64_t length; /* of all parts */
	uint64_t
		place; /* of a read's bytes in the reader's pool, for the inner rail; in one pool: of the payload */
	uint32_t imm;
	uint16_t flags;
	uint16_t part_count; /* further ones */
	uint64_t chain; /* as of struct tfd_post */
};

#define TFD_STAGED_MAGIC 0x32677473u /* "stg2" */

/* At the end of a half's address, behind that of its inner one. */
struct tfd_staged_address {
	uint32_t magic;
	uint32_t number;
	uint64_t token;
	uint64_t key; /* of its run, on the inner rail */
	uint64_t base; /* where that begins: side by side, so many slots */
	uint32_t slot_bytes;
	uint16_t payload_kib;
	uint16_t count;
};

_Static_assert(sizeof(struct tfd_staged_address) == 40, "no padding goes out");
_Static_assert(TFD_STAGED_SLOTS <= TFD_VOID_POSTS, "so its sender knows of each that is void");

/* A post of ours. */
struct tfd_staged_out {
	struct tfd_wr *wr;
	struct tfd_stage_slot *slot;
	const uint8_t *local; /* read: where the bytes go */
	const struct tfd_mr *mr;
	uint64_t chain;
	uint32_t length;
	uint32_t carried; /* bytes of the slot, by the inner rail */
	bool read;
	bool spoilt; /* it could not be copied here, or follows such a one: nothing goes in its place */
	bool ended; /* by the far side */
	bool brought; /* read: the bytes are on their way from the slot to their place */
	uint8_t status;
};

/* A post of the far side's, in a slot of ours. */
struct tfd_staged_in {
	struct tfd_stage_slot *slot;
	bool arrived;
	uint8_t status;
	struct tfd_staged_header header; /* copied once: the far side could write to it at any time */
};

/*
 * A chain of which a post has failed alone, or was not open: no immediate of it may be told behind that. Behind it so many posts can be under
 * way by then as a half has slots: the core posts no more of that chain once it was told.
 */
struct tfd_staged_spoilt {
	uint64_t chain;
	uint64_t number; /* of that post */
	uint8_t status; /* what those behind it are answered with */
};

struct tfd_half {
	struct tfd_list link; /* domain->halves */
	struct tfd_list active_link;
	struct tfd_domain *domain;
	struct tfd_half *inner; /* of the inner provider */
	void *owner;
	uint64_t token;
	uint32_t number;
	bool started;
	bool broken; /* takes no more posts, and ends none */
	bool lost; /* an error that is of no post waits to be told */
	bool closed;
	uint32_t copying; /* shared: requests of helpers under way for it; worker writes */
	/*
	 * Slots side by side, for as long as it lives: the first in_count take the far side's posts, the others its own. The far side
	 * has a key for these alone.
	 */
	struct tfd_stage_slot *run;
	uint32_t run_count;
	struct tfd_mr *run_mr; /* inner */
	struct tfd_region_key run_key;
	struct tfd_list own; /* of the run, in no use */
	uint32_t imms; /* of the inner rail's queue */
	struct tfd_list slots; /* all others that were taken for it */

	/* Posts of ours, by number: told < sent < next. */
	uint64_t out_told, out_sent, out_next;
	uint64_t out_asked; /* out_told at the last look for silence */
	uint32_t far_count; /* slots; 0: not started */
	uint32_t far_number;
	uint64_t far_token;
	uint64_t far_key;
	uint64_t far_slots[TFD_STAGED_SLOTS]; /* addresses for the inner rail */
	struct tfd_staged_out outs[TFD_STAGED_SLOTS];
	struct tfd_staged_spoilt out_spoilt[TFD_STAGED_SLOTS]; /* by the number of the post */

	/* The far side's posts: answered < told < begun. */
	uint64_t in_answered, in_told, in_begun;
	uint32_t in_count; /* slots */
	bool in_refused; /* the last one that was begun: nothing more may land */
	struct tfd_staged_in ins[TFD_STAGED_SLOTS];
	struct tfd_staged_spoilt in_spoilt[TFD_STAGED_SLOTS];
};

struct tfd_domain {
	const struct tfd_provider_ops *ops; /* constant; inner */
	struct tfd_domain *inner;
	struct tfd_stages *stages;
	bool stages_own;
	bool ordered; /* the inner rail */
	bool one_pool; /* both ends are in this group: what is in a slot is there for both */
	struct tfd_mr *pool_mr; /* inner; to send from */
	uint64_t payload_bytes;
	uint32_t imms_free; /* of the inner rail's queue, if it has a bound */
	bool imms_bound;
	struct tfd_memory memory;
	struct tfd_numbers numbers; /* of halves */
	struct tfd_list halves;
	struct tfd_list active;
	uint64_t pass_bytes; /* copied by the worker since the last poll */
	bool timed; /* the inner rail wakes nobody: it is polled in every pass */
	uint32_t hot; /* passes in which it is polled; then in some only */
	uint32_t passes;
	uint32_t under_way; /* posts of all halves */
	uint64_t asked_ns; /* when silence was looked for last */
	bool overflowed; /* to be told */
	bool gone;
};

/* What a poll fills. */
struct tfd_staged_told {
	struct tfd_wc *wc;
	int max;
	int count;
};

static inline bool tfd_staged_room(const struct tfd_staged_told *told)
{
	return told->count < told->max;
}

static inline void tfd_staged_tell(struct tfd_staged_told *told, struct tfd_wc wc)
{
	told->wc[told->count++] = wc;
}

/* From the beginning of its slot. */
static inline uint32_t tfd_staged_payload_at(uint32_t part_count)
{
	return (uint32_t)(sizeof(struct tfd_staged_header) + part_count * sizeof(struct tfd_staged_part) +
	                  TFD_LINE - 1) /
	       TFD_LINE * TFD_LINE;
}

static inline void tfd_staged_spoil(struct tfd_staged_spoilt *spoilt, uint64_t chain, uint64_t number,
                                    uint32_t status)
{
	spoilt[number % TFD_STAGED_SLOTS] = (struct tfd_staged_spoilt){ chain, number, (uint8_t)status };
}

/* enum tfd_staged_status: by what was before it. */
static inline uint32_t tfd_staged_spoilt_as(const struct tfd_staged_spoilt *spoilt, uint64_t chain,
                                            uint64_t number)
{
	for (uint32_t i = 0; i < TFD_STAGED_SLOTS; i++) {
		if (chain && spoilt[i].chain == chain && number - spoilt[i].number < TFD_STAGED_SLOTS)
			return spoilt[i].status;
	}
	return TFD_STAGED_OK;
}

/* Of the token of a half. */
static inline uint32_t tfd_staged_check(uint64_t token)
{
	return (uint32_t)(token >> 55);
}

static inline uint32_t tfd_staged_imm(uint32_t kind, uint32_t slot, uint64_t token, uint32_t number)
{
	return kind << 29 | slot << 25 | tfd_staged_check(token) << 16 | number;
}

/* staged.c */
void tfd_staged_wake(struct tfd_half *half); /* it has something to do */
void tfd_staged_break(struct tfd_half *half); /* by an error of no post's own */
/* One completion of the inner rail's. */
void tfd_staged_take(struct tfd_domain *domain, const struct tfd_wc *wc);

/* half.c */
int tfd_staged_half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                         void *address, size_t *address_bytes, struct tfd_error *error);
int tfd_staged_reach(struct tfd_domain *domain, const void *address, size_t address_bytes,
                     struct tfd_error *error);
int tfd_staged_half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                          struct tfd_error *error);
void tfd_staged_half_close(struct tfd_half *half);
int tfd_staged_half_settle(struct tfd_half *half);
int tfd_staged_half_drain(struct tfd_half *half, struct tfd_wc *wc, int max);
void tfd_staged_half_free(struct tfd_half *half);

/* copy.c */
/* The parts of a post at one end, side by side in a slot. */
struct tfd_staged_range {
	const struct tfd_mr *mr;
	const struct tfd_staged_part *parts; /* addresses from the beginning of `mr` */
	uint32_t part_count;
	uint64_t length; /* of all */
};
/* Copies between the pool and memory, or requests it; `slot` is told. -EAGAIN: not now; -EBUSY, -EIO: as tfd_stages_ask. */
int tfd_staged_copy(struct tfd_domain *domain, struct tfd_stage_slot *slot, uint64_t pool_offset,
                    const struct tfd_staged_range *range, uint32_t ring, bool waited);

/* send.c */
int tfd_staged_post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr);
void tfd_staged_send(struct tfd_half *half, struct tfd_staged_told *told);
void tfd_staged_ended(struct tfd_half *half, uint32_t slot, uint32_t status);
/*
 * Called now and then. Of a far side that is gone the inner rail may say nothing, if nothing of it is under way there: one that does
 * not answer is written to, nothing, so that it fails.
 */
void tfd_staged_ask(struct tfd_half *half);
/* Whether it has something to do that nothing will wake it for. */
bool tfd_staged_sends(const struct tfd_half *half);

/* receive.c */
void tfd_staged_receive(struct tfd_half *half, struct tfd_staged_told *told);
void tfd_staged_arrived(struct tfd_half *half, uint32_t slot);
bool tfd_staged_receives(const struct tfd_half *half);

/* A rail over `inner`, with what its group shares. For the core, which has opened that. */
int tfd_staged_domain_open(struct tfd_stages *stages, const struct tfd_provider_ops *inner,
                           const struct tfd_group_options *options, const char *name,
                           struct tfd_rail_info *info, struct tfd_domain **out, struct tfd_error *error);
/* What it shares: for tests. */
struct tfd_stages *tfd_staged_stages(struct tfd_domain *domain);

#endif
