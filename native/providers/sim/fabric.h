/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the simulated fabric share. The fabric's lock guards everything; `_locked` functions are called with it. */
#ifndef TFD_SIM_FABRIC_H
#define TFD_SIM_FABRIC_H

#include "../../core/barrier.h"
#include "../../core/parts.h"
#include "sim.h"

struct tfd_flight {
	struct tfd_list link; /* in its channel's flights, in the order of posting */
	struct tfd_post post;
	struct tfd_wr *wr; /* NULL: its sender has closed and is told */
	uint64_t due_ns;
	bool landed;
	bool refused;
	struct tfd_post_part parts[]; /* [options.parts - 1] */
};

/* What a rail has to tell, oldest first; it only grows. */
struct tfd_wc_queue {
	struct tfd_wc *items; /* owned */
	uint32_t capacity; /* a power of two, or 0 */
	uint32_t head;
	uint32_t tail;
};

struct tfd_mr {
	struct tfd_list link;
	uint64_t key;
	uint8_t *base;
	uint64_t length;
	bool writable;
	bool readable; /* by the far side */
};

#define TFD_SIM_PROTOCOL "sim/1"

/* Of a half. */
struct tfd_sim_address {
	char protocol[8];
	uint64_t name;
};

struct tfd_domain {
	struct tfd_sim_options options;
	struct tfd_list link;
	struct tfd_list halves;
	struct tfd_list mrs;
	struct tfd_wc_queue done;
	struct tfd_list flights_free; /* only grows */
	uint64_t free_ns; /* when it has sent what was posted */
	bool null; /* pieces neither move, nor take time, nor are refused by chance */
	uint64_t random;
	uint32_t flights;
	uint32_t imms; /* that wait to be polled */
	bool dead;
	uint32_t state; /* shared; enum tfd_rail_state */
};

enum tfd_sim_fault {
	TFD_SIM_BROKEN = 1,
	TFD_SIM_CLOSED = 2,
	TFD_SIM_MUTE = 4,
	TFD_SIM_FAILS_NEXT = 8,
};

/* One of a half's: pieces of one order, where the rail keeps any. */
struct tfd_sim_channel {
	struct tfd_list flights;
	uint64_t last_due_ns;
	bool mute;
};

struct tfd_half {
	struct tfd_list link; /* domain's */
	struct tfd_domain *domain;
	void *owner;
	uint64_t name;
	uint64_t far; /* 0: not started */
	struct tfd_half *far_half; /* NULL: to be looked for */
	const struct tfd_mr
		*at_once; /* null fabric: what is for it lands as it is posted; writable; NULL: all flies */
	struct tfd_sim_channel channels[TFD_CHANNELS_MAX]; /* options.channels */
	uint32_t faults; /* TFD_SIM_*; 0: all is well */
};

/* sim.c */
void tfd_sim_lock(void);
bool tfd_sim_takes_imm_locked(struct tfd_domain *domain); /* where there is a bound; else an overrun */
void tfd_sim_grow_locked(struct tfd_wc_queue *queue);
void tfd_sim_fault_locked(struct tfd_half *half, enum tfd_sim_fault fault);
uint64_t tfd_sim_random_locked(struct tfd_domain *domain);
struct tfd_half *tfd_sim_find_locked(uint64_t name); /* NULL: it was freed */

uint64_t tfd_sim_now_locked(void);

/* flight.c */
uint64_t tfd_sim_delay_locked(struct tfd_domain *domain);
void tfd_sim_flight_end_locked(struct tfd_half *half, struct tfd_flight *flight, bool error);
void tfd_sim_step_locked(struct tfd_half *half); /* what is due lands, or is told */

/* landing.c */
bool tfd_sim_is_cut_locked(struct tfd_half *half);
bool tfd_sim_usable(const struct tfd_half *half);
const struct tfd_mr *tfd_sim_mr_locked(const struct tfd_domain *domain, uint64_t key); /* NULL: nobody's */
/* Sets `landed`, `refused`, or breaks the half. */
void tfd_sim_land_locked(struct tfd_half *half, struct tfd_flight *flight);
void tfd_sim_land_some_locked(struct tfd_half *half, const struct tfd_flight *flight);

/* Of what was posted. */
static inline uint32_t tfd_sim_channel_of(const struct tfd_half *half, const struct tfd_post *post)
{
	return half->domain->options.channels == 1 ? 0 : post->traffic;
}

static inline bool tfd_sim_reaches(const struct tfd_mr *mr, uint64_t address, uint64_t length)
{
	uint64_t offset = address - (uint64_t)(uintptr_t)mr->base; /* of one before it: huge */

	return length <= mr->length && offset <= mr->length - length;
}

/* Held for a moment by one that polls: a mutex would be a third of what a piece costs on the null fabric. */
extern uint32_t tfd_sim_fabric_lock;

static inline bool tfd_sim_try_lock(void)
{
	return !tfd_swap_seq(&tfd_sim_fabric_lock, 1);
}

static inline void tfd_sim_unlock(void)
{
	tfd_store_release(&tfd_sim_fabric_lock, 0); /* pairs with tfd_sim_try_lock: all that it guards */
}

static inline bool tfd_sim_is_full(const struct tfd_wc_queue *queue)
{
	return queue->tail - queue->head == queue->capacity;
}

/* The next completion, to be filled; the queue is not full. */
static inline struct tfd_wc *tfd_sim_next(struct tfd_wc_queue *queue)
{
	return &queue->items[queue->tail++ & (queue->capacity - 1)];
}

static inline struct tfd_wc *tfd_sim_done_locked(struct tfd_domain *domain)
{
	if (tfd_sim_is_full(&domain->done))
		tfd_sim_grow_locked(&domain->done);
	return tfd_sim_next(&domain->done);
}

#endif
