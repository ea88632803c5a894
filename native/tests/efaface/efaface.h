/* SPDX-License-Identifier: Apache-2.0 */
/* What a test may set, and see, of EFA's face in its own process: dlsym these functions in the library. */
#ifndef TFD_EFAFACE_H
#define TFD_EFAFACE_H

#include <stdint.h>

/* Each has its first value from the environment: EFAFACE_<NAME>. */
struct efaface_control {
	uint32_t seed;
	uint32_t version; /* FI_VERSION that it answers with; EFAFACE_VERSION=2.4 */
	uint32_t delay; /* ticks, at most, that a piece, or the completion of an op, is held back; 0: none */
	uint32_t cut; /* of 100 writes, so many go in pieces of their own order */
	uint32_t tx_size; /* ops in flight on an endpoint; one more is -FI_EAGAIN */
	uint32_t eagain; /* of 100 posts, so many are refused with -FI_EAGAIN */
	uint32_t cq_size; /* entries of a completion queue; 0: as many as are asked for */
	uint32_t max_eps; /* endpoints of a process; 0: no bound */
	uint32_t loopback; /* 0: nothing reaches the own GID */
	uint32_t host; /* a number in the GID, which makes hosts of processes */
	uint32_t emulated; /* fabric efa emulates writes */
	uint32_t unsolicited; /* 0: immediates take receive buffers: no efa-direct */
	uint32_t mute; /* not 0: nothing goes out or comes in, as if the cable were out */
	/* After `fail_after` further writes with these immediates, `fail_count` of them fail. */
	uint32_t fail_after;
	uint32_t fail_count;
	uint32_t fail_error; /* FI_E… */
	uint32_t fail_prov_errno;
	uint32_t fail_lands; /* not 0: it lands all the same */
	uint32_t
		late; /* not 0: what is in flight as an endpoint is closed ends in the queue, which the real library does not do; 2: with an error */
	uint32_t
		dmabuf; /* 1: they are registered; 0: the library was built without; else refused with that errno */
	uint32_t
		inject; /* efa-direct: bytes at most of a write that the processor copies, unless told otherwise */
	uint32_t stubborn; /* not 0: it cannot be told otherwise */
};

struct efaface_stats {
	uint64_t writes, reads;
	uint64_t cut; /* writes in pieces */
	uint64_t overtaken; /* pieces that went out behind one of a younger op */
	uint64_t refused; /* -FI_EAGAIN */
	uint64_t failed; /* injected errors */
	uint64_t overruns; /* completions that were lost */
	uint64_t queued_most; /* entries of a completion queue at once */
	uint64_t more; /* posts with FI_MORE */
	uint64_t strays; /* immediates for another life of the endpoint */
	uint64_t purged; /* completions that nobody had read when their endpoint was closed */
	uint64_t eps; /* open */
	uint64_t dmabufs; /* registered */
};

/* For programs of one thread. */
struct efaface_control *efaface_knobs(void);
struct efaface_stats *efaface_counts(void);
/* While other threads use the library. */
void efaface_set(const struct efaface_control *knobs);
void efaface_get(struct efaface_stats *counts);

#endif
