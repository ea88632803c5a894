/* SPDX-License-Identifier: Apache-2.0 */
/* Fences: the jobs on some immediates are cancelled, and the caller is told when none of them is in flight any more. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "parts.h"

/* A read has no immediate, and writes nothing at the grant's owner. */
bool tfd_fence_names(const struct tfd_fence *fence, const struct tfd_job *job)
{
	uint32_t low = 0;
	uint32_t high = fence->range_count;

	if (job->op == TFD_OP_READ)
		return false;
	while (low < high) { /* the first range that does not end before it */
		uint32_t middle = low + (high - low) / 2;
		const struct tfd_imm_range *range = &fence->ranges[middle];

		if (job->imm >= range->first + range->count)
			low = middle + 1;
		else
			high = middle;
	}
	return low < fence->range_count && job->imm >= fence->ranges[low].first;
}

static void tell_if_quiet(struct tfd_open *open, struct tfd_fence *fence)
{
	struct tfd_event event = { .type = TFD_EVENT_FENCE_QUIET,
	                           .id = open->handle,
	                           .session = open->session->handle,
	                           .detail = fence->detail,
	                           .count = fence->number };

	if (fence->left)
		return;
	tfd_list_remove(&fence->link);
	free(fence);
	tfd_event_post(open->session->group->worker, &event);
}

void tfd_fences_leave(struct tfd_open *open, const struct tfd_shard *shard)
{
	struct tfd_list *link;
	struct tfd_list *next;

	for (link = open->fences.next; link != &open->fences; link = next) {
		struct tfd_fence *fence = tfd_container(link, struct tfd_fence, link);

		next = link->next;
		if (shard->number >= fence->before || !tfd_fence_names(fence, shard->job))
			continue;
		fence->left--;
		if (shard->job->copy_given_up && (shard->job->open || shard->failed))
			fence->detail = TFD_DETAIL_STILL_COPIED;
		tell_if_quiet(open, fence);
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

	if (!open)
		return -ENOENT;
	tfd_session_take_published(worker, call->session); /* submitted before the fence, if not taken yet */
	fence->before = open->next_shard;
	fence->left = 1; /* ours, while they are cancelled */
	for (struct tfd_list *link = open->shards.next; link != &open->shards; link = link->next)
		fence->left += tfd_fence_names(fence, tfd_container(link, struct tfd_shard, open_link)->job);
	tfd_list_push(&open->fences, &fence->link);
	tfd_open_cancel(open, fence, TFD_DETAIL_FENCED);
	fence->left--;
	tell_if_quiet(open, fence);
	return 0;
}

static int check_ranges(const struct tfd_imm_range *ranges, uint32_t count)
{
	uint32_t end = 0;

	for (uint32_t i = 0; i < count; i++) {
		if (!ranges[i].count || ranges[i].first < end || ranges[i].first >= TFD_IMM_COUNT ||
		    ranges[i].count > TFD_IMM_COUNT - ranges[i].first)
			return -ERANGE;
		end = ranges[i].first + ranges[i].count;
	}
	return count ? 0 : -ERANGE;
}

int tfd_open_fence(struct tfd_core *core, uint64_t session, uint64_t open, const struct tfd_imm_range *ranges,
                   uint32_t range_count, uint64_t number)
{
	struct fence_call call = { .open = open };
	size_t bytes = range_count * sizeof(*ranges);
	int rc = check_ranges(ranges, range_count);

	if (rc)
		return rc;
	call.fence = calloc(1, sizeof(*call.fence) + bytes);
	if (!call.fence)
		return -ENOMEM;
	call.fence->number = number;
	call.fence->range_count = range_count;
	memcpy(call.fence->ranges, ranges, bytes);
	tfd_list_init(&call.fence->link);
	call.session = tfd_session_get(core, session);
	rc = call.session ? tfd_command_run(call.session->group->worker, fence_command, &call) : -ENOENT;
	if (call.session)
		tfd_session_put(call.session);
	if (rc)
		free(call.fence);
	return rc;
}
