/* SPDX-License-Identifier: Apache-2.0 */
/* Fences: the jobs on some immediates are cancelled, and the caller is told when none of them is in flight any more. */
#include <errno.h>
#include <stdlib.h>

#include "parts.h"

static bool fence_holds(const struct tfd_open *open, const struct tfd_fence *fence)
{
	for (const struct tfd_list *link = open->shards.next; link != &open->shards; link = link->next) {
		const struct tfd_shard *shard = tfd_container(link, struct tfd_shard, open_link);
		uint32_t imm = shard->job->imm;

		if (shard->number < fence->before && imm >= fence->imm_first &&
		    imm - fence->imm_first < fence->imm_count)
			return true;
	}
	return false;
}

void tfd_fences_check(struct tfd_open *open)
{
	struct tfd_list *link;
	struct tfd_list *next;

	for (link = open->fences.next; link != &open->fences; link = next) {
		struct tfd_fence *fence = tfd_container(link, struct tfd_fence, link);
		struct tfd_event event = { .type = TFD_EVENT_FENCE_QUIET,
		                           .id = open->handle,
		                           .session = open->session->handle,
		                           .count = fence->number };

		next = link->next;
		if (fence_holds(open, fence))
			continue;
		tfd_list_remove(&fence->link);
		free(fence);
		tfd_event_post(open->session->group->worker, &event);
	}
}

void tfd_fences_free(struct tfd_open *open)
{
	while (!tfd_list_empty(&open->fences)) {
		struct tfd_fence *fence = tfd_container(open->fences.next, struct tfd_fence, link);

		tfd_list_remove(&fence->link);
		free(fence);
	}
}

/* ---- control's call ---- */

struct fence_call {
	struct tfd_session *session;
	struct tfd_fence *fence;
	uint64_t open;
};

static int fence_command(struct tfd_worker *worker, void *argument)
{
	struct fence_call *call = argument;
	struct tfd_open *open = tfd_table_get(&call->session->opens, call->open);
	struct tfd_fence *fence = call->fence;

	(void)worker;
	if (!open)
		return -ENOENT;
	fence->before = open->next_shard;
	tfd_open_cancel(open, fence->imm_first, fence->imm_count, TFD_DETAIL_FENCED);
	tfd_list_push(&open->fences, &fence->link);
	tfd_fences_check(open);
	return 0;
}

int tfd_open_fence(struct tfd_core *core, uint64_t session, uint64_t open, uint32_t imm_first,
                   uint32_t imm_count, uint64_t number)
{
	struct fence_call call = { .open = open };
	int rc;

	if (imm_count > TFD_IMM_COUNT || imm_first > TFD_IMM_COUNT - imm_count)
		return -ERANGE;
	call.fence = calloc(1, sizeof(*call.fence));
	if (!call.fence)
		return -ENOMEM;
	call.fence->number = number;
	call.fence->imm_first = imm_first;
	call.fence->imm_count = imm_count;
	tfd_list_init(&call.fence->link);
	call.session = tfd_session_get(core, session);
	rc = call.session ? tfd_command_run(call.session->group->worker, fence_command, &call) : -ENOENT;
	if (call.session)
		tfd_session_put(call.session);
	if (rc)
		free(call.fence);
	return rc;
}
