/* SPDX-License-Identifier: Apache-2.0 */
#include <time.h>

#include "parts.h"

uint64_t tfd_now_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}
