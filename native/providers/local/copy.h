/* SPDX-License-Identifier: Apache-2.0 */
/* How bytes are moved: by the thread that calls, or by a helper. */
#ifndef TFD_LOCAL_COPY_H
#define TFD_LOCAL_COPY_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "transferd/core.h"

#define TFD_LOCAL_PARTS 64u /* ranges of one post */

enum tfd_local_state {
	TFD_LOCAL_COPYING,
	TFD_LOCAL_COPIED,
	TFD_LOCAL_GONE, /* pages of what was read had been taken away: zeros were copied in their place */
};

/* Checked: both ranges lie in memory that stays until the copy has been told of. */
struct tfd_local_part {
	uint8_t *to;
	const uint8_t *from;
	uint64_t length;
};

struct tfd_local_copy {
	const uint32_t
		*broken; /* shared; of what is read, not 0 once its pages were taken away; NULL: never */
	uint32_t count;
	bool streams; /* of a job that is too long for the caches */
	struct tfd_local_part parts[TFD_LOCAL_PARTS];
};

/* Chooses how to stream on this processor. Idempotent; any thread. */
void tfd_local_copy_init(void);
enum tfd_local_state tfd_local_copy_run(const struct tfd_local_copy *copy);
/* Past the caches, where the processor can; the ranges may overlap. */
void tfd_local_stream(uint8_t *to, const uint8_t *from, uint64_t length);

#endif
