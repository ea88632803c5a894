/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a receiver has to be told of a write that failed: how much is known lost, and what has landed of it all the same, to be
 * taken out of its count, so that a retry reaches the same target.
 */
#include "barrier.h"
#include "parts.h"

#define QUEUED_MAX 4096u /* of one session: then its rings wait until control has caught up */

bool tfd_losses_wait(const struct tfd_session *session)
{
	return tfd_load_relaxed(&session->losses_queued) > QUEUED_MAX;
}

struct loss {
	uint64_t units; /* in all */
	uint64_t acked;
	uint64_t unknown;
};

static void loss_add(struct loss *loss, const struct tfd_shard *shard)
{
	loss->units += shard->units;
	loss->acked += shard->units_acked;
	loss->unknown += shard->units_unknown;
}

void tfd_loss_tell(const struct tfd_shard *shard, uint32_t status, uint32_t detail)
{
	const struct tfd_job *job = shard->job;
	struct tfd_session *session = job->session;
	struct tfd_event event = { .type = TFD_EVENT_LOST,
	                           .detail = detail,
	                           .id = shard->open->handle,
	                           .session = session->handle };
	struct loss loss = { 0 };

	if (job->open) {
		for (uint32_t i = 0; i < job->shard_count; i++)
			loss_add(&loss, &job->shards[i]);
	} else {
		loss_add(&loss, shard);
	}
	if (!loss.units || (loss.acked == loss.units && status != TFD_JOB_LOCAL_ACCESS))
		return;
	(void)tfd_add_relaxed(&session->losses_queued, 1); /* tfd_core_events takes it away */
	event.imm = job->imm & (TFD_IMM_COUNT - 1);
	event.count = (loss.units - loss.unknown) / 8; /* of the others nobody knows */
	event.units = loss.acked;
	tfd_event_post(session->group->worker, &event);
}
