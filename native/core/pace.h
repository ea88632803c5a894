/* SPDX-License-Identifier: Apache-2.0 */
/* How much bulk may be in flight on a rail beside urgent work; pace.c. Owner: worker. */
#ifndef TFD_PACE_H
#define TFD_PACE_H

#include <stdint.h>

#define TFD_BOOST_ONE 1024u

struct tfd_pace {
	uint64_t bulk_bytes; /* in flight, on connections that do not stand */
	uint64_t bulk_most; /* UINT64_MAX: nothing urgent, or the rate is not known */
	uint64_t boost; /* by which it is more than what drains in half a millisecond; in 1 / TFD_BOOST_ONE */
	uint64_t urgent_ns; /* when something of the latency class had to go out last; 0: never */
	uint64_t bytes_per_ms; /* 0: not known */
	uint64_t rate_ns; /* when that was measured last */
	uint64_t sample_ns; /* since when acknowledged bytes are counted; 0: they are not */
	uint64_t sample_bytes;
};

#endif
