/* SPDX-License-Identifier: Apache-2.0 */
/* Halves of connections: making, joining, ending. */
#include "conformance.h"

#include <errno.h>

#define DRAIN_MAX 16

static void end_make(struct rig *rig, uint32_t side, int outgoing, struct half_end *end)
{
	memset(end, 0, sizeof(*end));
	end->side = side;
	CHECK_OK(rig->ops->half_open(rig->sides[side].domain, outgoing, &end->owner, &end->half, end->address,
	                             &end->address_bytes, &error));
	CHECK(end->half && end->address_bytes && end->address_bytes <= TFD_ADDRESS_MAX);
}

void pair_make(struct rig *rig, struct pair *pair, uint32_t from)
{
	pair->from = &rig->sides[from];
	pair->to = &rig->sides[!from];
	end_make(rig, from, 1, &pair->out);
	end_make(rig, !from, 0, &pair->in);
}

void pair_start(struct rig *rig, struct pair *pair)
{
	CHECK_OK(rig->ops->half_start(pair->in.half, pair->out.address, pair->out.address_bytes, &error));
	CHECK_OK(rig->ops->half_start(pair->out.half, pair->in.address, pair->in.address_bytes, &error));
}

void pair_open(struct rig *rig, struct pair *pair, uint32_t from)
{
	pair_make(rig, pair, from);
	pair_start(rig, pair);
}

void half_end(struct rig *rig, struct half_end *end)
{
	uint32_t side = rig->one_domain ? 0 : end->side;
	struct tfd_wc wc[DRAIN_MAX];
	int count;

	if (!end->half)
		return;
	rig->ops->half_close(end->half);
	if (rig->ops->half_settle) /* copies of its may be under way */
		AWAIT(rig, rig->ops->half_settle(end->half) != -EAGAIN);
	while ((count = rig->ops->half_drain(end->half, wc, DRAIN_MAX)) > 0) {
		CHECK(count <= DRAIN_MAX);
		for (int i = 0; i < count; i++)
			rig_take(rig, side, &wc[i]);
	}
	CHECK(count == 0);
	rig->ops->half_free(end->half);
	for (uint32_t i = 0; i < PIECES; i++) {
		if (rig->pieces[i].state == PIECE_POSTED && rig->pieces[i].half == end->half)
			FAIL("a piece was not told of until its half was closed and drained");
	}
	end->half = NULL;
}

void pair_close(struct rig *rig, struct pair *pair)
{
	half_end(rig, &pair->in);
	half_end(rig, &pair->out);
}

bool owned_by(const struct rig *rig, const struct arrival *arrival, const struct half_end *end)
{
	return arrival->owner == &end->owner || (!arrival->owner && !rig->sides[end->side].info.ordered);
}
