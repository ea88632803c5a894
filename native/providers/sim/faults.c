/* SPDX-License-Identifier: Apache-2.0 */
/* What a test does to halves and rails. */
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

void tfd_sim_kill(struct tfd_domain *domain)
{
	tfd_sim_lock();
	domain->dead = true;
	for (struct tfd_list *link = domain->halves.next; link != &domain->halves; link = link->next)
		tfd_sim_fault_locked(tfd_container(link, struct tfd_half, link), TFD_SIM_BROKEN);
	tfd_sim_unlock();
}
