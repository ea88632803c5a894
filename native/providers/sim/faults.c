/* SPDX-License-Identifier: Apache-2.0 */
/* What a test does to halves and rails. */
#include <errno.h>

#include "../../core/parts.h"
#include "fabric.h"

void tfd_sim_break(struct tfd_half *half)
{
	tfd_sim_lock();
	tfd_sim_fault_locked(half, TFD_SIM_BROKEN);
	tfd_sim_unlock();
}

void tfd_sim_mute(struct tfd_half *half)
{
	for (uint32_t i = 0; i < half->domain->options.channels; i++)
		tfd_sim_mute_channel(half, i);
}

void tfd_sim_mute_channel(struct tfd_half *half, uint32_t channel)
{
	tfd_sim_lock();
	half->channels[channel].mute = true;
	tfd_sim_fault_locked(half, TFD_SIM_MUTE);
	tfd_sim_unlock();
}

void tfd_sim_fail(struct tfd_half *half)
{
	tfd_sim_lock();
	tfd_sim_fault_locked(half, TFD_SIM_FAILS_NEXT);
	tfd_sim_unlock();
}

static void kill_locked(struct tfd_domain *domain)
{
	domain->dead = true;
	for (struct tfd_list *link = domain->halves.next; link != &domain->halves; link = link->next)
		tfd_sim_fault_locked(tfd_container(link, struct tfd_half, link), TFD_SIM_BROKEN);
}

void tfd_sim_kill(struct tfd_domain *domain)
{
	tfd_sim_lock();
	kill_locked(domain);
	tfd_sim_unlock();
}

void tfd_sim_fatal(struct tfd_half *half)
{
	tfd_sim_lock();
	tfd_sim_fault_locked(half, TFD_SIM_BROKEN);
	*tfd_sim_done_locked(half->domain) =
		(struct tfd_wc){ .type = TFD_WC_ERROR, .error = EIO, .owner = half->owner };
	tfd_sim_unlock();
}

void tfd_sim_port(struct tfd_domain *domain, bool up)
{
	tfd_sim_lock();
	tfd_store_relaxed(&domain->state, up ? TFD_RAIL_UP : TFD_RAIL_DOWN);
	tfd_sim_unlock();
}

void tfd_sim_remove(struct tfd_domain *domain, bool tells)
{
	tfd_sim_lock();
	tfd_store_relaxed(&domain->state, TFD_RAIL_GONE);
	kill_locked(domain);
	if (tells)
		*tfd_sim_done_locked(domain) = (struct tfd_wc){ .type = TFD_WC_ERROR, .error = ENODEV };
	tfd_sim_unlock();
}
