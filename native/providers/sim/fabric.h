/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the simulated fabric share. The fabric's lock guards everything; `_locked` functions are called with it. */
#ifndef TFD_SIM_FABRIC_H
#define TFD_SIM_FABRIC_H

#include "../../core/parts.h"
#include "sim.h"

struct tfd_flight {
	struct tfd_list link; /* in its half's flights, in the order of posting */
	struct tfd_post post;
	struct tfd_wr *wr; /* NULL: its sender has closed and is told */
	uint64_t due_ns;
	bool landed;
	bool refused;
	struct tfd_post_part parts[]; /* [options.parts - 1] */
};

struct tfd_done {
	struct tfd_done *next;
	struct tfd_wc wc;
};

struct tfd_mr {
	struct tfd_list link;
	uint64_t key;
	uint8_t *base;
	uint64_t length;
	bool writable;
};

struct tfd_domain {
	struct tfd_sim_options options;
	struct tfd_list link;
	struct tfd_list halves;
	struct tfd_list mrs;
	struct tfd_done *first;
	struct tfd_done **last;
	struct tfd_done *done_free; /* these two lists only grow */
	struct tfd_list flights_free;
	uint64_t random;
	uint32_t flights;
	bool dead;
};

struct tfd_half {
	struct tfd_list link; /* domain's */
	struct tfd_domain *domain;
	void *owner;
	uint64_t name;
	uint64_t far; /* 0: not started */
	struct tfd_half *far_half; /* NULL: to be looked for */
	struct tfd_list flights;
	uint64_t last_due_ns;
	bool broken;
	bool closed;
	bool mute;
	bool fails_next;
};

/* sim.c */
void tfd_sim_complete_locked(struct tfd_domain *domain, const struct tfd_wc *wc);
uint64_t tfd_sim_random_locked(struct tfd_domain *domain);
struct tfd_half *tfd_sim_far_locked(struct tfd_half *half); /* NULL once it was freed */

/* landing.c */
bool tfd_sim_usable(const struct tfd_half *half);
/* Sets `landed`, `refused`, or breaks the half. */
void tfd_sim_land_locked(struct tfd_half *half, struct tfd_flight *flight);
void tfd_sim_land_some_locked(struct tfd_half *half, const struct tfd_flight *flight);

#endif
