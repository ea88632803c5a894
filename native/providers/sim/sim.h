/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fabric inside of one process, for tests: seeded, with delays, reordering and failures. All domains of the process are on it.
 * Parameters are text in tfd_group_options.fabric: "seed=7,ordered=0,delay_us=50,move=0,parts=8,max_message=1048576".
 */
#ifndef TFD_SIM_H
#define TFD_SIM_H

#include "../provider.h"

struct tfd_sim_options {
	uint64_t seed;
	uint32_t ordered; /* pieces of a connection land in the order of their posts; 1 */
	uint32_t
		delay_us; /* up to which pieces, and their acknowledgements, take; 0: done at the next poll */
	uint32_t move; /* 0: the null fabric, no bytes move; 1 */
	uint64_t max_message; /* 1 GiB */
	uint32_t parts; /* ranges of one post; 1 */
	uint32_t rate_gbps; /* bits that a rail sends in a nanosecond; 0: any number at once */
	uint32_t again; /* of 100 posts that are refused for now; 0 */
	uint32_t channels; /* 3: the three kinds of traffic of a connection overtake each other; 1 */
	uint32_t imm_depth; /* immediates that wait to be polled: one more is an overrun; 0: any number */
};

/* The time that the fabric goes by; 0: the real one. */
void tfd_sim_set_now(uint64_t now_ns);
/* What is in flight by this half does not land, or not be acknowledged; posts are refused. */
void tfd_sim_break(struct tfd_half *half);
/* Nothing of this half lands, and nothing is told, as if a cable had been pulled. */
void tfd_sim_mute(struct tfd_half *half);
void tfd_sim_mute_channel(struct tfd_half *half, uint32_t channel); /* that one alone */
/* The next piece of this half to land is told failed; whether it has landed is left to chance. */
void tfd_sim_fail(struct tfd_half *half);
/* What has completed and was not polled is lost, as if the completion queue had been too short. */
void tfd_sim_overrun(struct tfd_domain *domain);
/* Overruns that came by themselves, for want of room for immediates; of all rails. */
uint64_t tfd_sim_overruns(void);
/* The same as tfd_sim_break to every connection of the rail, in both directions, for ever. */
void tfd_sim_kill(struct tfd_domain *domain);

/* As tfd_sim_break, of which nothing need be in flight; its owner is told. */
void tfd_sim_fatal(struct tfd_half *half);
/* A port without a link: nothing lands or is told while it is so. Not on the null fabric. */
void tfd_sim_port(struct tfd_domain *domain, bool up);
/* The device is gone. `tells`: by a completion, too. */
void tfd_sim_remove(struct tfd_domain *domain, bool tells);

/* options.c: -EINVAL, with a sentence. */
int tfd_sim_parse(const char *text, struct tfd_sim_options *out, struct tfd_error *error);

#endif
