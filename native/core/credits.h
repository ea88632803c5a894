/* SPDX-License-Identifier: Apache-2.0 */
/* What a half knows of credits; credits.c says what they are. */
#ifndef TFD_CREDITS_H
#define TFD_CREDITS_H

#include <stdbool.h>
#include <stdint.h>

/* Messages about credits; bits. */
enum tfd_credit_message {
	TFD_CREDIT_ASK = 1, /* are those before it, which have been acknowledged, out of the queue? */
	TFD_CREDIT_SEEN = 2, /* they are */
};

/*
 * How many immediates a half may post that the far worker has not taken out of its rail's queue yet, and what it lets the far half
 * post (credits.c). Owner: worker.
 */
struct tfd_credits {
	uint32_t share; /* of our rail's queue, for what comes by this half; 0: the queue has no bound */
	uint32_t grant; /* of the far side's, for what goes out by this half */
	uint64_t taken; /* by what was posted */
	uint64_t limit; /* of `taken`; UINT64_MAX: there is none */
	uint64_t acked; /* of what was posted */
	uint64_t asked; /* `acked` when ASK went out last */
	uint64_t ask_at; /* ASK is due when `acked` is that far; UINT64_MAX: not now */
	uint64_t number; /* of our last ASK */
	uint64_t far_number; /* of the far side's */
	uint64_t flood_at; /* immediates that may have come by this half; UINT64_MAX: nobody counts */
	uint64_t stalled_ns; /* since when something waits for a credit; 0: nothing does */
	uint8_t due; /* enum tfd_credit_message: to be posted */
	uint8_t writing; /* posted, not back */
	bool asking; /* until SEEN comes */
};

#endif
