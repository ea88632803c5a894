/* SPDX-License-Identifier: Apache-2.0 */
/* Posts of ours: filled, sent in their order, and told in it once the far side has ended them. */
#include <errno.h>
#include <string.h>

#include "staged.h"

static bool reaches(const struct tfd_mr *mr, const void *local, uint64_t length)
{
	uint64_t offset = (uint64_t)((uintptr_t)local - (uintptr_t)mr->base);

	return offset <= mr->length && length <= mr->length - offset;
}

/* The parts of a post, at its near end and, in the slot, at its far end. -EINVAL: not of a post. */
static int parts_make(const struct tfd_post *post, struct tfd_staged_range *range,
                      struct tfd_staged_part *near, struct tfd_staged_part *far)
{
	range->mr = post->mr;
	range->parts = near;
	range->part_count = post->length ? post->part_count + 1 : 0;
	range->length = post->length;
	if (!post->length)
		return post->part_count ? -EINVAL : 0;
	if (!reaches(post->mr, post->local, post->length))
		return -EINVAL;
	near[0].address = (uint64_t)((uintptr_t)post->local - (uintptr_t)post->mr->base);
	near[0].length = post->length;
	for (uint32_t i = 0; i < post->part_count; i++) {
		const struct tfd_post_part *part = &post->parts[i];

		if (!reaches(post->mr, part->local, part->length))
			return -EINVAL;
		near[i + 1].address = (uint64_t)((uintptr_t)part->local - (uintptr_t)post->mr->base);
		far[i].address = part->remote_address;
		near[i + 1].length = far[i].length = part->length;
		range->length += part->length;
	}
	return 0;
}

static void header_make(const struct tfd_half *half, const struct tfd_post *post, uint64_t bytes,
                        const struct tfd_stage_slot *slot, struct tfd_staged_header *header)
{
	const struct tfd_domain *domain = half->domain;

	*header = (struct tfd_staged_header){ .token = half->far_token,
	                                      .number = half->out_next,
	                                      .key = bytes ? post->remote_key : 0,
	                                      .address = post->remote_address,
	                                      .length = bytes,
	                                      .chain = post->chain,
	                                      .imm = post->imm,
	                                      .part_count = (uint16_t)post->part_count };
	if (domain->one_pool)
		header->place = slot->offset + tfd_staged_payload_at(post->part_count);
	else if (post->read)
		header->place =
			half->run_key.address + (slot->offset - half->run->offset) + tfd_staged_payload_at(0);
	if (post->has_imm)
		header->flags |= TFD_STAGED_HAS_IMM;
	if (post->read)
		header->flags |= TFD_STAGED_READ;
	if (post->waited == TFD_WAITED_FAR)
		header->flags |= TFD_STAGED_WAITED;
}

/* The bytes of a write begin to come; of a read there is memory that they may go to. */
static int bytes_begin(struct tfd_half *half, const struct tfd_post *post, struct tfd_staged_out *out,
                       const struct tfd_staged_range *range)
{
	struct tfd_domain *domain = half->domain;
	uint64_t payload = out->slot->offset + tfd_staged_payload_at(post->part_count);
	bool waited = post->waited == TFD_WAITED_NEAR;

	if (tfd_staged_spoilt_as(half->out_spoilt, out->chain, half->out_next))
		return 0;
	if (!post->read)
		return tfd_staged_copy(domain, out->slot, payload, range, TFD_STAGE_D2H, waited);
	return range->length && range->mr->device ?
	               tfd_stages_ask(domain->stages, range->mr->device, waited) :
	               0;
}

static int fill(struct tfd_half *half, const struct tfd_post *post, struct tfd_staged_out *out)
{
	struct tfd_domain *domain = half->domain;
	uint8_t *slot = tfd_stage_slot_at(domain->stages, out->slot);
	struct tfd_staged_part near[TFD_STAGES_PARTS + 1];
	struct tfd_staged_part *far = (void *)(slot + sizeof(struct tfd_staged_header));
	uint32_t payload_at = tfd_staged_payload_at(post->part_count);
	struct tfd_staged_range range;
	int rc = parts_make(post, &range, near, far);

	if (rc)
		return rc;
	if (range.length > domain->payload_bytes)
		return -EMSGSIZE;
	header_make(half, post, range.length, out->slot, (void *)slot);
	out->length = (uint32_t)range.length;
	out->carried = payload_at;
	if (!post->read && !domain->one_pool)
		out->carried += out->length;
	rc = bytes_begin(half, post, out, &range);
	if (rc == -EIO) { /* it is told in its turn */
		out->slot->error = EIO;
		tfd_staged_spoil(half->out_spoilt, out->chain, half->out_next, TFD_STAGED_FAILED);
		rc = 0;
	}
	return rc;
}

int tfd_staged_post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr)
{
	struct tfd_stages *stages = half->domain->stages;
	struct tfd_staged_out *out;
	int rc;

	if (!half->started || half->broken)
		return -ENOTCONN;
	if (post->part_count > TFD_STAGES_PARTS || (post->read && post->part_count))
		return -EINVAL;
	if (post->length > half->domain->payload_bytes)
		return -EMSGSIZE;
	if (post->read && post->length && !post->mr->writable)
		return -EACCES;
	if (post->read && half->run_count == half->in_count) /* its run is for what it is sent */
		return -EOPNOTSUPP;
	if (half->out_next - half->out_told == half->far_count)
		return -EAGAIN;
	out = &half->outs[half->out_next % half->far_count];
	*out = (struct tfd_staged_out){
		.wr = wr, .local = post->local, .mr = post->mr, .chain = post->chain, .read = post->read != 0
	};
	out->slot = tfd_stage_slot_take(stages, half, post->read != 0); /* what is read comes into it */
	if (!out->slot)
		return -EAGAIN;
	rc = fill(half, post, out);
	if (rc) {
		tfd_stage_slot_put(stages, out->slot);
		return rc;
	}
	half->out_next++;
	half->domain->under_way++;
	tfd_staged_wake(half);
	return 0;
}

/* Its number goes all the same, so that what follows it has its turn. */
static void out_spoil(struct tfd_half *half, struct tfd_staged_out *out)
{
	struct tfd_staged_header *header = (void *)tfd_stage_slot_at(half->domain->stages, out->slot);

	out->spoilt = true;
	out->carried = sizeof(*header);
	header->length = header->place = 0;
	header->flags = (header->flags & TFD_STAGED_HAS_IMM) | TFD_STAGED_VOID;
	header->part_count = 0;
	tfd_staged_spoil(half->out_spoilt, out->chain, half->out_sent, TFD_STAGED_FAILED);
}

/* To the far half. Whether it went. */
static bool out_go(struct tfd_half *half, struct tfd_staged_out *out)
{
	struct tfd_domain *domain = half->domain;
	uint32_t index = (uint32_t)(half->out_sent % half->far_count);
	struct tfd_post post = {
		.local = tfd_stage_slot_at(domain->stages, out->slot),
		.mr = domain->pool_mr,
		.length = out->carried,
		.remote_address = half->far_slots[index],
		.remote_key = half->far_key,
		.has_imm = 1,
		.imm = tfd_staged_imm(TFD_STAGED_POST, index, half->far_token, half->far_number),
	};
	int rc = domain->ops->post(half->inner, &post, &out->slot->wr);

	if (rc == -EAGAIN)
		return false;
	if (rc) {
		tfd_staged_break(half);
		return false;
	}
	out->slot->posted = true;
	half->out_sent++;
	return true;
}

static void outs_send(struct tfd_half *half)
{
	while (half->out_sent != half->out_next && !half->broken) {
		struct tfd_staged_out *out = &half->outs[half->out_sent % half->far_count];

		if (out->slot->copies)
			return;
		if (out->slot->error || tfd_staged_spoilt_as(half->out_spoilt, out->chain, half->out_sent))
			out_spoil(half, out);
		if (!out_go(half, out))
			return;
	}
}

void tfd_staged_ended(struct tfd_half *half, uint32_t slot, uint32_t status)
{
	uint64_t count = half->far_count;
	uint64_t number;

	if (half->broken || !count)
		return;
	number = half->out_told + (slot + count - half->out_told % count) % count;
	if (slot >= count || number >= half->out_sent || half->outs[slot].ended ||
	    status > TFD_STAGED_NOT_OPEN ||
	    (status == TFD_STAGED_NOT_OPEN &&
	     !half->outs[slot].chain)) { /* what is of no chain has no bytes */
		tfd_staged_break(half);
		return;
	}
	half->outs[slot].ended = true;
	half->outs[slot].status = (uint8_t)status;
	if (status == TFD_STAGED_FAILED)
		tfd_staged_spoil(half->out_spoilt, half->outs[slot].chain, number, status);
}

/* What was read goes to its place: 0 once it is there. */
static int bring(struct tfd_half *half, struct tfd_staged_out *out)
{
	struct tfd_staged_part part = { .length = out->length };
	struct tfd_staged_range range = {
		.mr = out->mr, .parts = &part, .part_count = 1, .length = out->length
	};
	int rc = 0;

	if (!out->length)
		return 0;
	if (!out->brought) {
		part.address = (uint64_t)(out->local - out->mr->base);
		rc = tfd_staged_copy(half->domain, out->slot, out->slot->offset + tfd_staged_payload_at(0),
		                     &range, TFD_STAGE_H2D, true);
		out->brought = !rc;
		if (rc == -EBUSY) /* it was open when this was posted: its helper has ended since */
			rc = -EIO;
	}
	if (!rc && out->slot->copies)
		return -EAGAIN;
	return rc ? rc : -out->slot->error;
}

/* How it has ended; false: not yet. */
static bool out_end(struct tfd_half *half, struct tfd_staged_out *out, struct tfd_wc *wc)
{
	int rc = out->status || out->spoilt ? -EIO : out->read ? bring(half, out) : 0;

	if (rc == -EAGAIN)
		return false;
	*wc = (struct tfd_wc){ .type = TFD_WC_SENT, .wr = out->wr };
	if (!rc)
		return true;
	wc->type = TFD_WC_NOT_OPEN;
	if (out->status == TFD_STAGED_NOT_OPEN)
		return true;
	wc->type = TFD_WC_ERROR;
	wc->error = EIO;
	wc->remote_access = out->status != TFD_STAGED_OK && !out->spoilt;
	wc->alone = out->status != TFD_STAGED_REFUSED;
	if (wc->alone)
		return true;
	wc->error = EACCES;
	half->broken = true;
	return true;
}

static void outs_tell(struct tfd_half *half, struct tfd_staged_told *told)
{
	while (half->out_told != half->out_sent && tfd_staged_room(told)) {
		struct tfd_staged_out *out = &half->outs[half->out_told % half->far_count];
		struct tfd_wc wc;

		if (!out->ended || !out_end(half, out, &wc))
			return;
		tfd_stage_slot_put(half->domain->stages, out->slot);
		half->out_told++;
		half->domain->under_way--;
		tfd_staged_tell(told, wc);
	}
}

/* It has broken: nobody will tell of the rest. What a helper reads or writes for one is waited for. */
static void outs_drop(struct tfd_half *half, struct tfd_staged_told *told)
{
	while (half->out_told != half->out_next && tfd_staged_room(told)) {
		struct tfd_staged_out *out = &half->outs[half->out_told % half->far_count];

		if (out->slot->copies)
			return;
		half->out_told++; /* bytes may yet come into its slot, which stays the half's */
		half->domain->under_way--;
		half->out_sent += half->out_sent < half->out_told;
		tfd_staged_tell(told,
		                (struct tfd_wc){ .type = TFD_WC_ERROR, .wr = out->wr, .error = ECANCELED });
	}
}

void tfd_staged_send(struct tfd_half *half, struct tfd_staged_told *told)
{
	outs_send(half);
	outs_tell(half, told);
	if (half->broken)
		outs_drop(half, told);
}

void tfd_staged_ask(struct tfd_half *half)
{
	struct tfd_post post = { .remote_address = half->far_slots[0], .remote_key = half->far_key };
	struct tfd_stage_slot *slot;
	int rc;

	if (half->broken || half->out_told == half->out_sent)
		return;
	slot = half->outs[half->out_told % half->far_count].slot;
	if (half->out_asked == half->out_told && !slot->posted) {
		rc = half->domain->ops->post(half->inner, &post, &slot->wr);
		if (!rc)
			slot->posted = true;
		else if (rc != -EAGAIN)
			tfd_staged_break(half);
	}
	half->out_asked = half->out_told;
}

bool tfd_staged_sends(const struct tfd_half *half)
{
	if (half->out_told != half->out_sent && half->outs[half->out_told % half->far_count].ended)
		return true;
	return half->out_sent != half->out_next || (half->broken && half->out_told != half->out_next);
}
