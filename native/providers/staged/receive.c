/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The far side's posts: taken in their order, checked against our own table of keys, told once their bytes are visible, and answered.
 * What is in a slot is untrusted, and may change at any time: it is copied before it is looked at.
 */
#include <errno.h>
#include <string.h>

#include "../../core/barrier.h"
#include "staged.h"

void tfd_staged_arrived(struct tfd_half *half, uint32_t slot)
{
	if (half->in_refused)
		return;
	/* One that was not answered yet has it. */
	if (slot >= half->in_count || half->ins[slot].arrived) {
		tfd_staged_break(half);
		return;
	}
	half->ins[slot].arrived = true;
}

static bool within(uint64_t offset, uint64_t length, uint64_t bytes)
{
	return offset <= bytes && length <= bytes - offset;
}

/* In one pool: its bytes are in a slot of the far half's, which may have ended, and another have that by now. */
static bool is_theirs(const struct tfd_half *half, const struct tfd_staged_header *header)
{
	const struct tfd_stages *stages = half->domain->stages;
	const struct tfd_half *owner;

	if (!header->length)
		return true;
	if (!within(header->place, header->length, stages->pool_bytes))
		return false;
	owner = tfd_stage_slot_of(stages, header->place)->half;
	return owner && owner->far_token == half->token;
}

/* It is as our kind makes them; what is not is nobody's post. */
static bool is_whole(const struct tfd_half *half, const struct tfd_staged_header *header)
{
	if (header->token != half->token || header->number != half->in_begun)
		return false;
	if (header->part_count > TFD_STAGES_PARTS || header->length > half->domain->payload_bytes)
		return false;
	if (half->domain->one_pool && !is_theirs(half, header))
		return false;
	return !(header->flags & TFD_STAGED_READ) ||
	       !(header->part_count || (header->flags & TFD_STAGED_HAS_IMM));
}

/* Its parts, the first one too, from the beginning of the memory. false: they leave it, or are not what it says. */
static bool parts_take(const struct tfd_staged_header *header, const uint8_t *slot, const struct tfd_mr *mr,
                       struct tfd_staged_part *parts)
{
	uint64_t left = header->length;

	memcpy(&parts[1], slot + sizeof(*header), header->part_count * sizeof(parts[0]));
	for (uint32_t i = 1; i <= header->part_count; i++) {
		if (!parts[i].length || parts[i].length >= left ||
		    !within(parts[i].address, parts[i].length, mr->length))
			return false;
		left -= parts[i].length;
	}
	parts[0] = (struct tfd_staged_part){ header->address, left };
	return within(header->address, left, mr->length);
}

/* Where in our pool its bytes are, or of a read will be. */
static uint64_t payload_of(const struct tfd_half *half, const struct tfd_staged_in *in)
{
	return half->domain->one_pool ? in->header.place :
	                                in->slot->offset + tfd_staged_payload_at(in->header.part_count);
}

/* enum tfd_staged_status, or -EAGAIN. What is not open is answered at once: everybody's posts are in this order. */
static int begin(struct tfd_half *half, struct tfd_staged_in *in)
{
	struct tfd_domain *domain = half->domain;
	const uint8_t *slot = tfd_stage_slot_at(domain->stages, in->slot);
	const struct tfd_staged_header *header = &in->header;
	struct tfd_staged_part parts[TFD_STAGES_PARTS + 1];
	bool reads = header->flags & TFD_STAGED_READ;
	uint32_t spoilt = tfd_staged_spoilt_as(half->in_spoilt, header->chain, half->in_begun);
	int rc;
	struct tfd_staged_range range = { .parts = parts,
	                                  .part_count = header->part_count + 1u,
	                                  .length = header->length };

	in->slot->error = 0;
	if (header->flags & TFD_STAGED_VOID)
		return TFD_STAGED_FAILED;
	if (spoilt || !header->length)
		return (int)spoilt;
	range.mr = tfd_mr_find_hot(&domain->memory, header->key);
	if (!range.mr || !(reads ? range.mr->readable : range.mr->writable) ||
	    !parts_take(header, slot, range.mr, parts))
		return TFD_STAGED_REFUSED;
	rc = tfd_staged_copy(domain, in->slot, payload_of(half, in), &range,
	                     reads ? TFD_STAGE_D2H : TFD_STAGE_H2D, header->flags & TFD_STAGED_WAITED);
	if (rc == -EBUSY)
		return TFD_STAGED_NOT_OPEN;
	return rc == -EAGAIN ? rc : rc ? TFD_STAGED_FAILED : TFD_STAGED_OK;
}

static void ins_begin(struct tfd_half *half)
{
	while (half->in_begun - half->in_answered < half->in_count && !half->in_refused) {
		struct tfd_staged_in *in = &half->ins[half->in_begun % half->in_count];
		int rc;

		if (!in->arrived)
			return;
		memcpy(&in->header, tfd_stage_slot_at(half->domain->stages, in->slot), sizeof(in->header));
		if (!is_whole(half, &in->header)) {
			in->arrived =
				false; /* of an earlier half, or wrong: whoever sent it is not answered */
			if (half->domain->ordered)
				tfd_staged_break(half);
			return;
		}
		rc = begin(half, in);
		if (rc == -EAGAIN)
			return;
		in->status = (uint8_t)rc;
		if (in->status == TFD_STAGED_FAILED || in->status == TFD_STAGED_NOT_OPEN)
			tfd_staged_spoil(half->in_spoilt, in->header.chain, half->in_begun, in->status);
		half->in_begun++;
		half->in_refused = in->status == TFD_STAGED_REFUSED; /* nothing may land behind it */
	}
}

static void in_tell(const struct tfd_half *half, const struct tfd_staged_in *in, struct tfd_staged_told *told)
{
	bool has_imm = in->header.flags & TFD_STAGED_HAS_IMM;

	if (in->status == TFD_STAGED_FAILED || in->status == TFD_STAGED_NOT_OPEN)
		tfd_staged_tell(told,
		                (struct tfd_wc){ .type = TFD_WC_VOID, .imm = has_imm, .owner = half->owner });
	else if (!in->status && has_imm)
		tfd_staged_tell(
			told,
			(struct tfd_wc){ .type = TFD_WC_IMM, .imm = in->header.imm, .owner = half->owner });
}

/* Visible, or failed: so it is told, before it is answered. */
static void ins_tell(struct tfd_half *half, struct tfd_staged_told *told)
{
	while (half->in_told != half->in_begun && tfd_staged_room(told)) {
		struct tfd_staged_in *in = &half->ins[half->in_told % half->in_count];
		uint64_t chain = in->header.chain;

		if (in->slot->copies)
			return;
		if (!in->status &&
		    (in->slot->error || tfd_staged_spoilt_as(half->in_spoilt, chain, half->in_told)))
			in->status = TFD_STAGED_FAILED;
		if (in->status == TFD_STAGED_FAILED)
			tfd_staged_spoil(half->in_spoilt, chain, half->in_told, in->status);
		in_tell(half, in, told);
		half->in_told++;
	}
}

/* -EAGAIN: not now. */
static int answer(struct tfd_half *half, struct tfd_staged_in *in, uint32_t index)
{
	struct tfd_domain *domain = half->domain;
	uint32_t kind = TFD_STAGED_ENDED + in->status;
	/* Of no bytes, too: libfabric's tcp looks at the key all the same. */
	struct tfd_post post = { .remote_address = half->far_slots[0],
	                         .remote_key = half->far_key,
	                         .has_imm = 1 };
	int rc;

	if (in->slot->posted) /* its last answer, of which the inner rail has not told yet */
		return -EAGAIN;
	if (!in->status && (in->header.flags & TFD_STAGED_READ) && in->header.length && !domain->one_pool) {
		post.local = tfd_stage_slot_at(domain->stages, in->slot) + tfd_staged_payload_at(0);
		post.mr = domain->pool_mr;
		post.length = in->header.length;
		post.remote_address = in->header.place;
	}
	post.imm = tfd_staged_imm(kind, index, half->far_token, half->far_number);
	rc = domain->ops->post(half->inner, &post, &in->slot->wr);
	if (!rc)
		in->slot->posted = true;
	return rc;
}

static void ins_answer(struct tfd_half *half)
{
	while (half->in_answered != half->in_told && !half->broken) {
		uint32_t index = (uint32_t)(half->in_answered % half->in_count);
		struct tfd_staged_in *in = &half->ins[index];
		int rc = answer(half, in, index);

		if (rc == -EAGAIN)
			return;
		if (rc) {
			tfd_staged_break(half);
			return;
		}
		in->arrived = false; /* from here on the far side may use it again */
		half->in_answered++;
	}
}

void tfd_staged_receive(struct tfd_half *half, struct tfd_staged_told *told)
{
	if (!half->started) /* it could not answer */
		return;
	ins_begin(half);
	ins_tell(half, told);
	ins_answer(half);
}

bool tfd_staged_receives(const struct tfd_half *half)
{
	if (!half->started)
		return false;
	if (half->in_told != half->in_begun)
		return true;
	if (half->in_answered != half->in_told && !half->broken)
		return true;
	return half->in_begun - half->in_answered < half->in_count && !half->in_refused &&
	       half->ins[half->in_begun % half->in_count].arrived;
}
