/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a daemon's worker and the helper process of one GPU share: the pool, a memfd of host memory that slots are cut from, and one
 * memfd with the rings of requests to copy between memory of that GPU and the pool. The daemon makes both, the helper maps both and
 * registers them with CUDA. Each ring has one stream, so its copies are complete in the order of the ring.
 *
 * Orders: native/core/barrier.h; the pairs: native/README.md, Memory model. The daemon believes the helper no further than bounds.
 */
#ifndef TRANSFERD_STAGE_H
#define TRANSFERD_STAGE_H

#include <stdint.h>

#define TFD_STAGE_MAGIC 0x3145474154534454ull /* "TDSTAGE1" */
#define TFD_STAGE_VERSION 1u
#define TFD_STAGE_ENTRIES 1024u /* of a ring; a power of two */

#define TFD_STAGE_D2H 0u /* index of the ring: from the GPU's memory into the pool */
#define TFD_STAGE_H2D 1u /* from the pool into the GPU's memory */
#define TFD_STAGE_RINGS 2u

enum tfd_stage_state {
	TFD_STAGE_STARTING = 0, /* requests may be in the rings already; they wait */
	TFD_STAGE_READY = 1,
	TFD_STAGE_DEAD =
		2, /* a sticky error, told in `reason`; nothing that is under way gets done any more */
};

/*
 * `rows` times `bytes`: in the GPU's memory `stride` bytes apart, in the pool one behind the other. Of one row `stride` says nothing.
 * Writer: daemon.
 */
struct tfd_stage_copy {
	uint64_t memory; /* number that the control plane gave the allocation; not 0 */
	uint64_t offset; /* into it */
	uint64_t pool_offset;
	uint64_t stride; /* at least `bytes`, if there are several rows */
	uint32_t bytes; /* of a row; not 0 */
	uint32_t rows; /* not 0 */
	uint64_t _resv0;
};

/* Indices run free and are masked on use. */
struct tfd_stage_ring {
	/* line 0; writer: daemon */
	uint64_t
		tail; /* entries below it are requested; stored seq, loaded acquire (seq by who is about to sleep) */
	uint8_t _resv0[56];
	/*
	 * line 1; writer: the GPU, by a write on the stream behind the copies: as many are complete, counted from the ring's
	 * beginning. What they moved is visible, and their status is stored, before it. Their entries are free again.
	 */
	uint64_t done;
	uint8_t _resv1[56];
	/*
	 * Writer: helper, before it enqueues the write of `done` that covers the entry; every time. 0, or a positive errno, and then
	 * nothing was copied: ENOENT this memory is not open here, ERANGE it leaves the memory or the pool, EINVAL it is malformed,
	 * EIO else.
	 */
	uint32_t status[TFD_STAGE_ENTRIES];
	struct tfd_stage_copy entries[TFD_STAGE_ENTRIES];
};

struct tfd_stage {
	/* line 0; constant; writer: daemon */
	uint64_t magic;
	uint32_t version;
	uint32_t _resv0;
	uint64_t pool_bytes;
	uint64_t generation; /* counts the helpers of this daemon */
	uint8_t _resv1[32];
	/* line 1; writer: helper */
	uint32_t state; /* enum tfd_stage_state; DEAD is stored after `reason` (release; acquire) */
	/*
	 * Not 0 while it sleeps, or is about to: it stores this (seq), then looks at both tails. Who stores a tail looks at it (seq)
	 * and writes 8 bytes, a 1, to the eventfd.
	 */
	uint32_t sleeps;
	uint8_t _resv2[56];
	/* lines 2 and 3; writer: helper */
	char reason[128]; /* why it is DEAD; one sentence, NUL-terminated */

	struct tfd_stage_ring rings[TFD_STAGE_RINGS];
};

#endif
