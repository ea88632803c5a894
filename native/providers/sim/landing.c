/* SPDX-License-Identifier: Apache-2.0 */
/* What happens to a piece where it arrives. */
#include <string.h>

#include "fabric.h"

static struct tfd_half *far_locked(struct tfd_half *half)
{
	if (!half->far_half)
		half->far_half = tfd_sim_find_locked(half->far);
	return half->far_half;
}

const struct tfd_mr *tfd_sim_mr_locked(const struct tfd_domain *domain, uint64_t key)
{
	for (const struct tfd_list *link = domain->mrs.next; link != &domain->mrs; link = link->next) {
		const struct tfd_mr *mr = tfd_container(link, struct tfd_mr, link);

		if (mr->key == key)
			return mr;
	}
	return NULL;
}

static bool move(const struct tfd_domain *domain, const struct tfd_mr *mr, const struct tfd_post *post,
                 const void *local, uint64_t address, uint64_t length)
{
	void *remote = (void *)(uintptr_t)address;

	if (!tfd_sim_reaches(mr, address, length) || !(post->read ? mr->readable : mr->writable))
		return false;
	if (!domain->options.move)
		return true;
	if (post->read)
		memcpy((void *)(uintptr_t)local, remote, length);
	else
		memcpy(remote, local, length);
	return true;
}

/* What it posted, with so many of its further parts; what comes before one that is refused has landed. */
static bool move_locked(const struct tfd_half *far, const struct tfd_post *post,
                        const struct tfd_post_part *parts, uint32_t count)
{
	const struct tfd_domain *domain = far->domain;
	const struct tfd_mr *mr;

	if (!post->length)
		return true;
	mr = tfd_sim_mr_locked(domain, post->remote_key);
	if (!mr || !move(domain, mr, post, post->local, post->remote_address, post->length))
		return false;
	for (uint32_t i = 0; i < count; i++) {
		if (!move(domain, mr, post, parts[i].local, parts[i].remote_address, parts[i].length))
			return false;
	}
	return true;
}

/* A port of either end has no link. */
bool tfd_sim_is_cut_locked(struct tfd_half *half)
{
	const struct tfd_half *far = far_locked(half);

	return half->domain->state == TFD_RAIL_DOWN || (far && far->domain->state == TFD_RAIL_DOWN);
}

bool tfd_sim_usable(const struct tfd_half *half)
{
	return half && !(half->faults & (TFD_SIM_CLOSED | TFD_SIM_BROKEN)) && !half->domain->dead;
}

void tfd_sim_land_locked(struct tfd_half *half, struct tfd_flight *flight)
{
	struct tfd_half *far = far_locked(half);

	/* What had left before its sender closed still arrives; what breaks takes both ends with it. */
	if (!tfd_sim_usable(far) || (half->faults & TFD_SIM_BROKEN) || half->domain->dead) {
		tfd_sim_fault_locked(half, TFD_SIM_BROKEN);
		return;
	}
	if (!move_locked(far, &flight->post, flight->parts, flight->post.part_count)) {
		flight->refused = true;
		return;
	}
	flight->landed = true;
	if (flight->post.has_imm &&
	    (!far->domain->options.imm_depth || tfd_sim_takes_imm_locked(far->domain)))
		*tfd_sim_done_locked(far->domain) =
			(struct tfd_wc){ .type = TFD_WC_IMM,
			                 .imm = flight->post.imm,
			                 .order = tfd_sim_channel_of(half, &flight->post),
			                 .owner = half->domain->options.ordered ? far->owner : NULL };
}

/* A connection that breaks cuts a post of several parts anywhere; whatever of it has landed, its immediate does not. */
void tfd_sim_land_some_locked(struct tfd_half *half, const struct tfd_flight *flight)
{
	struct tfd_half *far = far_locked(half);

	if (flight->post.part_count && tfd_sim_usable(far) && !(half->faults & TFD_SIM_CLOSED) &&
	    !half->domain->dead)
		(void)move_locked(far, &flight->post, flight->parts,
		                  (uint32_t)tfd_sim_random_locked(half->domain) % flight->post.part_count);
}
