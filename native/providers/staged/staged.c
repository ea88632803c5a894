/* SPDX-License-Identifier: Apache-2.0 */
/* The rail: what it has of the one below, its memory, a pass. */
#include "staged.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POLL_BATCH 64
#define POLL_ROUNDS 4
#define ASK_NS 100000000u
#define HOT_PASSES 4096u /* after something has gone or come by the inner rail */
#define COLD_PASSES 16u /* else it is polled once in so many: it may cost a call of the kernel */
#define POOL_BYTES_DEFAULT (256u << 20) /* of a rail that has it for itself */

/* ---- rails ---- */

static void domain_close(struct tfd_domain *domain)
{
	if (!domain)
		return;
	while (!tfd_list_empty(&domain->halves)) {
		struct tfd_half *half = tfd_container(domain->halves.next, struct tfd_half, link);

		domain->ops->half_close(half->inner);
		tfd_staged_half_free(half);
	}
	if (domain->pool_mr)
		domain->ops->mr_close(domain->inner, domain->pool_mr);
	if (domain->inner)
		domain->ops->domain_close(domain->inner);
	if (domain->stages_own)
		tfd_stages_close(domain->stages);
	free(domain->numbers.items);
	tfd_memory_fini(&domain->memory);
	free(domain);
}

static int info_fill(struct tfd_domain *domain, const struct tfd_rail_info *inner, const char *name,
                     struct tfd_rail_info *info, struct tfd_error *error)
{
	uint64_t most = inner->max_message_bytes;

	if (most < TFD_STAGES_HEAD_BYTES + TFD_REQUEST_BYTES)
		return tfd_fail(error, -ENOTSUP, "rail %s carries %llu bytes at once: too few to stage", name,
		                (unsigned long long)most);
	most -= TFD_STAGES_HEAD_BYTES;
	domain->payload_bytes =
		most < TFD_STAGES_PAYLOAD_BYTES ? most / 1024 * 1024 : TFD_STAGES_PAYLOAD_BYTES;
	domain->ordered = inner->ordered != 0;
	domain->one_pool = domain->ops == &tfd_local_ops;
	domain->imms_bound = inner->imm_depth != 0;
	domain->imms_free = inner->imm_depth;
	(void)snprintf(info->name, sizeof(info->name), "staged/%.56s", name);
	(void)snprintf(info->provider, sizeof(info->provider), "staged/%.56s", inner->provider);
	(void)snprintf(info->protocol, sizeof(info->protocol), "staged/%.56s", inner->protocol);
	memcpy(info->why, inner->why, sizeof(info->why));
	info->max_message_bytes = domain->payload_bytes;
	info->ordered = 1;
	info->max_parts = TFD_STAGES_PARTS + 1;
	info->emulated = inner->emulated;
	return 0;
}

int tfd_staged_domain_open(struct tfd_stages *stages, const struct tfd_provider_ops *inner,
                           const struct tfd_group_options *options, const char *name,
                           struct tfd_rail_info *info, struct tfd_domain **out, struct tfd_error *error)
{
	struct tfd_domain *domain = calloc(1, sizeof(*domain));
	struct tfd_rail_info below = { 0 };
	struct tfd_region_key nobodys; /* no far side is told: it is to send from */
	int rc;

	if (!domain)
		return tfd_fail(error, -ENOMEM, "no memory for a rail");
	domain->ops = inner;
	domain->stages = stages;
	tfd_list_init(&domain->halves);
	tfd_list_init(&domain->active);
	tfd_memory_init(&domain->memory);
	rc = inner->domain_open(options, name, &below, &domain->inner, error);
	if (!rc)
		rc = info_fill(domain, &below, name, info, error);
	if (!rc)
		rc = inner->mr_open(domain->inner, stages->pool, stages->pool_bytes, TFD_MR_UNREADABLE,
		                    &domain->pool_mr, &nobodys, error);
	if (rc) {
		domain_close(domain);
		return rc;
	}
	domain->timed = inner->wait_fd(domain->inner) < 0;
	*out = domain;
	return 0;
}

/* By its name: `fabric` is that of the provider below, and after a colon its own. The pool is the rail's own. */
static int domain_open(const struct tfd_group_options *options, const char *name, struct tfd_rail_info *info,
                       struct tfd_domain **out, struct tfd_error *error)
{
	struct tfd_group_options below = *options;
	char *colon = strchr(below.fabric, ':');
	const struct tfd_provider_ops *inner;
	struct tfd_stages *stages;
	int rc;

	if (colon)
		*colon = '\0';
	inner = tfd_provider_find(below.fabric);
	if (!inner || inner == &tfd_staged_ops)
		return tfd_fail(error, -EINVAL,
		                "staged: fabric is \"%s\"; it names the provider of the rail below, as tcp",
		                options->fabric);
	(void)snprintf(below.provider, sizeof(below.provider), "%s", inner->name);
	memmove(below.fabric, colon ? colon + 1 : "", colon ? strlen(colon + 1) + 1 : 1);
	rc = tfd_stages_open(options->staging_bytes ? options->staging_bytes : POOL_BYTES_DEFAULT, &stages,
	                     error);
	if (rc)
		return rc;
	rc = tfd_staged_domain_open(stages, inner, &below, name, info, out, error);
	if (rc)
		tfd_stages_close(stages);
	else
		(*out)->stages_own = true;
	return rc;
}

static uint32_t rail_state(const struct tfd_domain *domain)
{
	return domain->ops->rail_state ? domain->ops->rail_state(domain->inner) : TFD_RAIL_UP;
}

struct tfd_stages *tfd_staged_stages(struct tfd_domain *domain)
{
	return domain->stages;
}

/* ---- memory ---- */

static int mr_add(struct tfd_domain *domain, const struct tfd_memory_range *range, struct tfd_mr **out,
                  struct tfd_region_key *key, struct tfd_error *error)
{
	int rc;

	if (rail_state(domain) == TFD_RAIL_GONE)
		return tfd_fail(error, -ENODEV, "the device of the rail below is gone");
	rc = tfd_memory_add(&domain->memory, range, out, error);
	if (!rc)
		*key = (struct tfd_region_key){ .key = (*out)->key };
	return rc;
}

static int mr_open(struct tfd_domain *domain, void *address, size_t length, uint32_t access,
                   struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	const struct tfd_memory_range range = { address, length, access, 0, 0 };

	return mr_add(domain, &range, out, key, error);
}

static int mr_open_device(struct tfd_domain *domain, const struct tfd_device_memory *memory, int writable,
                          struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	const struct tfd_memory_range range = { (void *)(uintptr_t)memory->address, memory->length,
	                                        writable ? TFD_MR_WRITABLE : 0, memory->number,
	                                        memory->offset };

	return mr_add(domain, &range, out, key, error);
}

static void mr_close(struct tfd_domain *domain, struct tfd_mr *mr)
{
	tfd_memory_remove(&domain->memory, mr);
}

/* ---- a pass ---- */

void tfd_staged_wake(struct tfd_half *half)
{
	half->domain->hot = HOT_PASSES;
	if (tfd_list_empty(&half->active_link) && !half->closed)
		tfd_list_push(&half->domain->active, &half->active_link);
}

void tfd_staged_break(struct tfd_half *half)
{
	if (half->closed || half->broken)
		return;
	half->broken = half->in_refused = half->lost = true;
	tfd_staged_wake(half);
}

/* By whom it came, or for whom. NULL: nobody's, or for one that is no more. */
static struct tfd_half *half_of(struct tfd_domain *domain, const struct tfd_wc *wc)
{
	struct tfd_half *half = tfd_numbers_get(&domain->numbers, wc->imm & 0xffff);

	if (!half || half->closed || (wc->imm >> 16 & 0x1ff) != tfd_staged_check(half->token))
		return NULL;
	return wc->owner && wc->owner != half ? NULL : half;
}

static void imm_take(struct tfd_domain *domain, const struct tfd_wc *wc)
{
	struct tfd_half *half = half_of(domain, wc);
	uint32_t kind = wc->imm >> 29;
	uint32_t slot = wc->imm >> 25 & 15;

	if (!half || (!wc->owner && domain->ordered))
		return;
	if (kind == TFD_STAGED_POST)
		tfd_staged_arrived(half, slot);
	else
		tfd_staged_ended(half, slot, kind - TFD_STAGED_ENDED);
	tfd_staged_wake(half);
}

static void error_take(struct tfd_domain *domain, const struct tfd_wc *wc)
{
	if (wc->error == EOVERFLOW && !wc->owner)
		domain->overflowed = true;
	else if (wc->owner)
		tfd_staged_break(wc->owner);
	else if (wc->error == ENODEV)
		domain->gone = true;
}

void tfd_staged_take(struct tfd_domain *domain, const struct tfd_wc *wc)
{
	struct tfd_stage_slot *slot;

	if (wc->type == TFD_WC_IMM) {
		imm_take(domain, wc);
		return;
	}
	if (!wc->wr) {
		error_take(domain, wc);
		return;
	}
	slot = tfd_container(wc->wr, struct tfd_stage_slot, wr);
	if (wc->type == TFD_WC_ERROR && slot->half)
		tfd_staged_break(slot->half);
	else if (slot->half) /* an answer may wait for it */
		tfd_staged_wake(slot->half);
	tfd_stage_slot_posted(domain->stages, slot);
}

static void errors_tell(struct tfd_domain *domain, struct tfd_staged_told *told)
{
	if (domain->overflowed && tfd_staged_room(told)) {
		domain->overflowed = false;
		tfd_staged_tell(told, (struct tfd_wc){ .type = TFD_WC_ERROR, .error = EOVERFLOW });
	}
	if (domain->gone && tfd_staged_room(told)) {
		domain->gone = false;
		tfd_staged_tell(told, (struct tfd_wc){ .type = TFD_WC_ERROR, .error = ENODEV });
	}
}

static bool half_turn(struct tfd_half *half, struct tfd_staged_told *told)
{
	tfd_staged_receive(half, told);
	tfd_staged_send(half, told);
	if (half->lost && tfd_staged_room(told)) {
		half->lost = false;
		tfd_staged_tell(
			told,
			(struct tfd_wc){ .type = TFD_WC_ERROR, .error = ECONNRESET, .owner = half->owner });
	}
	return half->lost || tfd_staged_receives(half) || tfd_staged_sends(half);
}

/* Each once, and who was first is last the next time. */
static void halves_turn(struct tfd_domain *domain, struct tfd_staged_told *told)
{
	struct tfd_list *last = domain->active.prev;

	while (!tfd_list_empty(&domain->active)) {
		struct tfd_list *link = domain->active.next;
		struct tfd_half *half = tfd_container(link, struct tfd_half, active_link);

		tfd_list_remove(link);
		if (half_turn(half, told))
			tfd_staged_wake(half);
		if (link == last)
			return;
	}
}

/* Whether this is a pass in which the inner rail is polled. */
static bool is_due(struct tfd_domain *domain)
{
	if (domain->hot) {
		domain->hot--;
		return true;
	}
	return domain->timed || !tfd_list_empty(&domain->active) || ++domain->passes % COLD_PASSES == 0;
}

static void inner_poll(struct tfd_domain *domain)
{
	struct tfd_wc wc[POLL_BATCH];

	for (int round = 0; round < POLL_ROUNDS; round++) {
		int count = domain->ops->poll(domain->inner, wc, POLL_BATCH);

		for (int i = 0; i < count; i++)
			tfd_staged_take(domain, &wc[i]);
		if (count < POLL_BATCH)
			return;
	}
}

static void halves_ask(struct tfd_domain *domain)
{
	uint64_t now_ns = tfd_now_ns();

	if (now_ns - domain->asked_ns < ASK_NS)
		return;
	domain->asked_ns = now_ns;
	for (struct tfd_list *link = domain->halves.next; link != &domain->halves; link = link->next)
		tfd_staged_ask(tfd_container(link, struct tfd_half, link));
}

static int poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	struct tfd_staged_told told = { .wc = wc, .max = max };

	tfd_stages_poll(domain->stages);
	if (!is_due(domain))
		return 0; /* nothing is to be done, or it would be */
	domain->pass_bytes = 0;
	tfd_memory_pass_begin(&domain->memory);
	halves_turn(domain, &told); /* what they post is on its way with the inner poll */
	inner_poll(domain);
	if (domain->under_way)
		halves_ask(domain);
	errors_tell(domain, &told);
	halves_turn(domain, &told);
	tfd_memory_pass_end(&domain->memory);
	return told.count;
}

static int wait_fd(struct tfd_domain *domain)
{
	return domain->ops->wait_fd(domain->inner);
}

/* A GPU wakes nobody: while something is copied, it is looked at. */
static int arm(struct tfd_domain *domain)
{
	int rc;

	if (!tfd_list_empty(&domain->active) || domain->stages->under_way || domain->overflowed ||
	    domain->gone)
		return -EAGAIN;
	rc = domain->ops->arm(domain->inner);
	if (rc)
		domain->hot += !domain->hot;
	return rc;
}

const struct tfd_provider_ops tfd_staged_ops = {
	.name = "staged",
	.path_id = TFD_PATH_STAGED,
	.domain_open = domain_open,
	.domain_close = domain_close,
	.mr_open = mr_open,
	.mr_open_device = mr_open_device,
	.mr_close = mr_close,
	.half_open = tfd_staged_half_open,
	.reach = tfd_staged_reach,
	.half_start = tfd_staged_half_start,
	.half_close = tfd_staged_half_close,
	.half_settle = tfd_staged_half_settle,
	.half_drain = tfd_staged_half_drain,
	.half_free = tfd_staged_half_free,
	.post = tfd_staged_post,
	.poll = poll,
	.rail_state = rail_state,
	.wait_fd = wait_fd,
	.arm = arm,
};
