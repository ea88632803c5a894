/* SPDX-License-Identifier: Apache-2.0 */
/* Between slots and memory: the host's by the worker, that of a GPU by its helper. */
#include <errno.h>
#include <string.h>

#include "../../core/barrier.h"
#include "staged.h"

#define PASS_BYTES                                                                                    \
	(1u << 20) /* copied by the worker between two polls: rings and other rails wait meanwhile */
#define ROWS_STRIDE_MAX (1u << 30) /* between rows of one copy: what a GPU takes as a pitch */

/* Of its own for tests/tsan.supp: bytes are clients', and two may write to the same ones at once. */
static __attribute__((noinline)) void tfd_staged_move(uint8_t *to, const uint8_t *from, uint64_t length)
{
	memcpy(to, from, length);
}

static int copy_here(struct tfd_domain *domain, uint8_t *payload, const struct tfd_staged_range *range,
                     uint32_t ring)
{
	if (domain->pass_bytes >= PASS_BYTES)
		return -EAGAIN;
	domain->pass_bytes += range->length;
	for (uint32_t i = 0; i < range->part_count; i++) {
		uint8_t *memory = range->mr->base + range->parts[i].address;

		if (ring == TFD_STAGE_D2H)
			tfd_staged_move(payload, memory, range->parts[i].length);
		else
			tfd_staged_move(memory, payload, range->parts[i].length);
		payload += range->parts[i].length;
	}
	/* The guard stores it before it puts other pages there. */
	return range->mr->broken && tfd_load_seq(range->mr->broken) ? -EIO : 0;
}

/* How many parts from `first` on are of one length and one distance: one copy of so many rows. */
static uint32_t rows_of(const struct tfd_staged_range *range, uint32_t first, uint64_t *stride)
{
	const struct tfd_staged_part *parts = range->parts + first;
	uint32_t left = range->part_count - first;
	uint32_t rows = 1;

	*stride = 0;
	if (left < 2)
		return 1;
	*stride = parts[1].address - parts[0].address;
	if (*stride < parts[0].length || *stride > ROWS_STRIDE_MAX) {
		*stride = 0;
		return 1;
	}
	while (rows < left && parts[rows].length == parts[0].length &&
	       parts[rows].address - parts[rows - 1].address == *stride)
		rows++;
	return rows;
}

static int copy_there(struct tfd_domain *domain, struct tfd_stage_slot *slot, uint64_t pool_offset,
                      const struct tfd_staged_range *range, uint32_t ring, bool waited)
{
	struct tfd_stage_copy copies[TFD_STAGES_PARTS + 1];
	uint32_t count = 0;

	for (uint32_t i = 0; i < range->part_count;) {
		struct tfd_stage_copy *copy = &copies[count++];

		*copy = (struct tfd_stage_copy){ .memory = range->mr->device,
		                                 .offset = range->mr->device_offset + range->parts[i].address,
		                                 .pool_offset = pool_offset,
		                                 .bytes = (uint32_t)range->parts[i].length };
		copy->rows = rows_of(range, i, &copy->stride);
		pool_offset += (uint64_t)copy->bytes * copy->rows;
		i += copy->rows;
	}
	slot->error = 0;
	return tfd_stages_copy(domain->stages, ring, slot, copies, count, waited);
}

int tfd_staged_copy(struct tfd_domain *domain, struct tfd_stage_slot *slot, uint64_t pool_offset,
                    const struct tfd_staged_range *range, uint32_t ring, bool waited)
{
	if (!range->length)
		return 0;
	if (range->mr->device)
		return copy_there(domain, slot, pool_offset, range, ring, waited);
	return copy_here(domain, domain->stages->pool + pool_offset, range, ring);
}
