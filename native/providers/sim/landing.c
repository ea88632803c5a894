/* SPDX-License-Identifier: Apache-2.0 */
/* What happens to a piece where it arrives. */
#include <string.h>

#include "fabric.h"

static const struct tfd_mr *mr_find(const struct tfd_domain *domain, uint64_t key)
{
	for (const struct tfd_list *link = domain->mrs.next; link != &domain->mrs; link = link->next) {
		const struct tfd_mr *mr = tfd_container(link, struct tfd_mr, link);

		if (mr->key == key)
			return mr;
	}
	return NULL;
}

static bool reaches(const struct tfd_mr *mr, const struct tfd_post *post, uint64_t address, uint64_t length)
{
	uint64_t base = (uint64_t)(uintptr_t)mr->base;

	return address >= base && address - base <= mr->length && length <= mr->length - (address - base) &&
	       (post->read || mr->writable);
}

static bool move(const struct tfd_domain *domain, const struct tfd_mr *mr, const struct tfd_post *post,
                 const struct tfd_post_part *part)
{
	void *remote = (void *)(uintptr_t)part->remote_address;

	if (!reaches(mr, post, part->remote_address, part->length))
		return false;
	if (!domain->options.move)
		return true;
	if (post->read)
		memcpy((void *)(uintptr_t)part->local, remote, part->length);
	else
		memcpy(remote, part->local, part->length);
	return true;
}

/* The first `parts` of what it posted; what comes before one that is refused has landed. */
static bool move_locked(struct tfd_half *far, const struct tfd_flight *flight, uint32_t parts)
{
	const struct tfd_post *post = &flight->post;
	const struct tfd_post_part first = { post->local, post->remote_address, post->length };
	const struct tfd_mr *mr;

	if (!post->length)
		return true;
	mr = mr_find(far->domain, post->remote_key);
	if (!mr || !move(far->domain, mr, post, &first))
		return false;
	for (uint32_t i = 0; i + 1 < parts; i++) {
		if (!move(far->domain, mr, post, &flight->parts[i]))
			return false;
	}
	return true;
}

bool tfd_sim_usable(const struct tfd_half *half)
{
	return half && !half->closed && !half->broken && !half->domain->dead;
}

void tfd_sim_land_locked(struct tfd_half *half, struct tfd_flight *flight)
{
	struct tfd_half *far = tfd_sim_far_locked(half);

	/* What had left before its sender closed still arrives; what breaks takes both ends with it. */
	if (!tfd_sim_usable(far) || half->broken || half->domain->dead) {
		half->broken = true;
		return;
	}
	if (!move_locked(far, flight, 1 + flight->post.part_count)) {
		flight->refused = true;
		return;
	}
	flight->landed = true;
	if (flight->post.has_imm)
		tfd_sim_complete_locked(
			far->domain,
			&(struct tfd_wc){ .type = TFD_WC_IMM,
			                  .imm = flight->post.imm,
			                  .owner = half->domain->options.ordered ? far->owner : NULL });
}

/* A connection that breaks cuts a post anywhere; whatever of it has landed, its immediate does not. */
void tfd_sim_land_some_locked(struct tfd_half *half, const struct tfd_flight *flight)
{
	struct tfd_half *far = tfd_sim_far_locked(half);

	if (flight->post.part_count && tfd_sim_usable(far) && !half->closed && !half->domain->dead)
		(void)move_locked(far, flight,
		                  1 + (uint32_t)tfd_sim_random_locked(half->domain) %
		                                  flight->post.part_count);
}
