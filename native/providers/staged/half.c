/* SPDX-License-Identifier: Apache-2.0 */
/* Halves: what they hold of the pool, how they find each other, how they end. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "../../core/barrier.h"
#include "staged.h"

#define NUMBERS_MAX (1u << 16)
#define SHARE_PART 16u
#define KEPT_PART 8u
#define DRAIN_BATCH 16
#define DRAIN_ROUNDS 512
#define SETTLE_NS \
	20000000u /* for copies under way, before control is told to ask again: mostly they take microseconds */
#define SETTLE_PAUSE_NS 200000

/* ---- opening ---- */

/*
 * How many slots it is written to, if it is: a 16th of what there is. The last ones of the pool are kept for halves that get as few as do,
 * so that whoever comes late has a path.
 */
static uint32_t share_of(const struct tfd_stages *stages)
{
	uint32_t left = stages->run_count - stages->held;
	uint32_t kept = stages->run_count / KEPT_PART;
	uint32_t share = left > kept ? (left - kept) / SHARE_PART : 0;

	return share < TFD_STAGED_SLOTS ? share : TFD_STAGED_SLOTS;
}

static int slots_take(struct tfd_half *half, int outgoing, struct tfd_error *error)
{
	struct tfd_domain *domain = half->domain;
	uint32_t share = share_of(domain->stages);
	uint32_t least = 1, most = share ? share : 1;

	if (outgoing) { /* it is sent answers, which are short */
		least = 2;
		most = share / 2 > TFD_STAGED_OWN ? 1 + TFD_STAGED_OWN : share > 3 ? 1 + share / 2 : 2;
	}
	if (!tfd_stage_run_take(domain->stages, half, least, most))
		return tfd_fail(error, -ENOSPC,
		                "the staging pool of %llu bytes has no slot left for a connection: "
		                "raise gpu.staging_bytes",
		                (unsigned long long)domain->stages->pool_bytes);
	half->in_count = outgoing ? 1 : half->run_count;
	for (uint32_t i = 0; i < half->in_count; i++) {
		half->ins[i].slot = &half->run[i];
		tfd_list_remove(&half->run[i].link);
		tfd_list_push(&half->slots, &half->run[i].link);
	}
	if (domain->imms_bound) { /* those that come, and as many answers to ours */
		if (domain->imms_free < half->in_count + TFD_STAGED_SLOTS)
			return tfd_fail(error, -ENOSPC, "the rail's queue has no room for a connection");
		half->imms = half->in_count + TFD_STAGED_SLOTS;
		domain->imms_free -= half->imms;
	}
	return 0;
}

/* Of its own, so that the far side reaches no slots but these, and reads none. */
static int run_register(struct tfd_half *half, struct tfd_error *error)
{
	struct tfd_domain *domain = half->domain;

	return domain->ops->mr_open(domain->inner, tfd_stage_slot_at(domain->stages, half->run),
	                            half->run_count * TFD_STAGES_SLOT_BYTES,
	                            TFD_MR_WRITABLE | TFD_MR_UNREADABLE, &half->run_mr, &half->run_key,
	                            error);
}

static void address_write(const struct tfd_half *half, void *address, size_t *address_bytes)
{
	const struct tfd_domain *domain = half->domain;
	struct tfd_staged_address tail = { .magic = TFD_STAGED_MAGIC,
	                                   .number = half->number,
	                                   .token = half->token,
	                                   .key = half->run_key.key,
	                                   .base = half->run_key.address,
	                                   .slot_bytes = (uint32_t)TFD_STAGES_SLOT_BYTES,
	                                   .payload_kib = (uint16_t)(domain->payload_bytes >> 10),
	                                   .count = (uint16_t)half->in_count };

	memcpy((uint8_t *)address + *address_bytes, &tail, sizeof(tail));
	*address_bytes += sizeof(tail);
}

static int half_fill(struct tfd_half *half, int outgoing, void *address, size_t *address_bytes,
                     struct tfd_error *error)
{
	struct tfd_domain *domain = half->domain;
	int rc;

	if (getrandom(&half->token, sizeof(half->token), 0) != (ssize_t)sizeof(half->token))
		return tfd_fail(error, -EIO, "getrandom gave no token");
	rc = slots_take(half, outgoing, error);
	if (!rc)
		rc = run_register(half, error);
	if (rc)
		return rc;
	rc = domain->ops->half_open(domain->inner, outgoing, half, &half->inner, address, address_bytes,
	                            error);
	if (rc)
		return rc;
	if (*address_bytes + sizeof(struct tfd_staged_address) > TFD_ADDRESS_MAX)
		return tfd_fail(error, -ENOSPC, "the address of the rail below takes %zu bytes",
		                *address_bytes);
	address_write(half, address, address_bytes);
	return 0;
}

int tfd_staged_half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                         void *address, size_t *address_bytes, struct tfd_error *error)
{
	struct tfd_half *half = calloc(1, sizeof(*half));
	uint8_t filled[TFD_ADDRESS_MAX];
	size_t filled_bytes = sizeof(filled);
	int rc;

	if (!half)
		return tfd_fail(error, -ENOMEM, "no memory for a connection");
	half->domain = domain;
	half->owner = owner;
	tfd_list_init(&half->link);
	tfd_list_init(&half->active_link);
	tfd_list_init(&half->slots);
	tfd_list_init(&half->own);
	rc = tfd_numbers_take(&domain->numbers, NUMBERS_MAX, half, &half->number);
	if (rc) {
		free(half);
		return tfd_fail(error, rc, "the rail has all its %u halves of connections", NUMBERS_MAX);
	}
	tfd_list_push(&domain->halves, &half->link);
	rc = half_fill(half, outgoing, filled, &filled_bytes, error);
	if (rc) {
		if (half->inner)
			tfd_staged_half_close(half);
		tfd_staged_half_free(half);
		return rc;
	}
	memcpy(address, filled, filled_bytes);
	*address_bytes = filled_bytes;
	*out = half;
	return 0;
}

/* ---- joining ---- */

int tfd_staged_reach(struct tfd_domain *domain, const void *address, size_t address_bytes,
                     struct tfd_error *error)
{
	if (!domain->ops->reach || address_bytes <= sizeof(struct tfd_staged_address))
		return 0; /* half_start says what is wrong with it */
	return domain->ops->reach(domain->inner, address, address_bytes - sizeof(struct tfd_staged_address),
	                          error);
}

int tfd_staged_half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                          struct tfd_error *error)
{
	struct tfd_domain *domain = half->domain;
	struct tfd_staged_address tail = { 0 };
	int rc;

	if (address_bytes > sizeof(tail)) {
		address_bytes -= sizeof(tail);
		memcpy(&tail, (const uint8_t *)address + address_bytes, sizeof(tail));
	}
	if (tail.magic != TFD_STAGED_MAGIC || !tail.count || tail.count > TFD_STAGED_SLOTS ||
	    tail.number >= NUMBERS_MAX || tail.slot_bytes != TFD_STAGES_SLOT_BYTES ||
	    tail.payload_kib < domain->payload_bytes >> 10)
		return tfd_fail(error, -EPROTO,
		                "the far half's address is no staged rail's, or its slots are others: use "
		                "one version of transferd on both hosts");
	half->far_number = tail.number;
	half->far_token = tail.token;
	half->far_key = tail.key;
	half->far_count = tail.count;
	for (uint32_t i = 0; i < half->far_count; i++)
		half->far_slots[i] = tail.base + i * (uint64_t)tail.slot_bytes;
	rc = domain->ops->half_start(half->inner, address, address_bytes, error);
	if (rc)
		return rc;
	half->started = true;
	tfd_staged_wake(half); /* something may have come by now */
	return 0;
}

/* ---- ending ---- */

/* First nothing may come by the inner half, and no copy is asked for any more. */
void tfd_staged_half_close(struct tfd_half *half)
{
	half->closed = half->broken = half->in_refused = true;
	half->lost = false;
	half->domain->ops->half_close(half->inner);
	tfd_list_remove(&half->active_link);
	tfd_list_remove(&half->link);
}

/* Then what was asked for has to be done with, by its helper or with its helper's end. */
int tfd_staged_half_settle(struct tfd_half *half)
{
	const struct timespec pause = { .tv_nsec = SETTLE_PAUSE_NS };
	struct tfd_domain *domain = half->domain;
	uint64_t until_ns = tfd_now_ns() + SETTLE_NS;
	int rc = domain->ops->half_settle ? domain->ops->half_settle(half->inner) : 0;

	while (!rc && tfd_load_acquire(&half->copying)) { /* pairs with request_told */
		if (tfd_now_ns() >= until_ns)
			return -EAGAIN;
		(void)nanosleep(&pause, NULL);
	}
	return rc;
}

/* What the far side has ended before is told as it ended; of the rest nobody knows. */
static int outs_flush(struct tfd_half *half, struct tfd_wc *wc, int max)
{
	int count = 0;

	for (; count < max && half->out_told != half->out_next; half->out_told++) {
		const struct tfd_staged_out *out = &half->outs[half->out_told % half->far_count];
		bool sent = half->out_told < half->out_sent && out->ended && !out->status && !out->spoilt &&
		            !out->read;

		wc[count++] =
			sent ? (struct tfd_wc){ .type = TFD_WC_SENT, .wr = out->wr } :
			       (struct tfd_wc){ .type = TFD_WC_ERROR, .wr = out->wr, .error = ECANCELED };
	}
	half->domain->under_way -= (uint32_t)count;
	return count;
}

int tfd_staged_half_drain(struct tfd_half *half, struct tfd_wc *wc, int max)
{
	struct tfd_domain *domain = half->domain;
	struct tfd_wc inner[DRAIN_BATCH];
	int count;

	for (int round = 0; round < DRAIN_ROUNDS; round++) {
		count = domain->ops->half_drain(half->inner, inner, DRAIN_BATCH);
		for (int i = 0; i < count; i++)
			tfd_staged_take(domain, &inner[i]);
		if (!count)
			break;
	}
	return outs_flush(half, wc, max);
}

void tfd_staged_half_free(struct tfd_half *half)
{
	struct tfd_domain *domain = half->domain;

	tfd_list_remove(&half->active_link);
	tfd_list_remove(&half->link);
	domain->under_way -= (uint32_t)(half->out_next - half->out_told);
	if (half->inner)
		domain->ops->half_free(half->inner);
	if (half->run_mr)
		domain->ops->mr_close(domain->inner, half->run_mr);
	tfd_numbers_give(&domain->numbers, half->number);
	domain->imms_free += half->imms;
	tfd_stage_slots_abandon(domain->stages, half);
	free(half);
}
