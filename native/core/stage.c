/* SPDX-License-Identifier: Apache-2.0 */
/* Control's calls about staging: what a group's staged rails share (providers/staged). */
#include <errno.h>
#include <unistd.h>

#include "../providers/staged/stages.h"
#include "barrier.h"
#include "parts.h"

static void tell(void *context, uint32_t type, uint64_t id)
{
	struct tfd_group *group = context;
	struct tfd_event event = { .type = type, .id = id, .count = group->index };

	tfd_event_post(group->worker, &event);
}

int tfd_group_stages_open(struct tfd_group *group, uint64_t bytes, struct tfd_error *error)
{
	int rc = tfd_stages_open(bytes, &group->stages, error);

	if (rc)
		return rc;
	group->stages->tell = tell;
	group->stages->context = group;
	return 0;
}

struct stage_call {
	struct tfd_stage_helper *helper;
	uint64_t stage; /* 0: none */
	uint64_t memory;
	struct tfd_stage_info info;
};

static int call_run(struct tfd_core *core, uint32_t group, int (*run)(struct tfd_worker *, void *),
                    struct stage_call *call)
{
	if (group >= core->group_count || !core->groups[group]->stages)
		return -ENOTSUP;
	return tfd_command_run(core->groups[group]->worker, run, call);
}

static int add_command(struct tfd_worker *worker, void *argument)
{
	struct stage_call *call = argument;

	tfd_stage_helper_add(worker->group->stages, call->helper);
	return 0;
}

static int close_command(struct tfd_worker *worker, void *argument)
{
	struct stage_call *call = argument;

	call->helper = tfd_stage_helper_find(worker->group->stages, call->stage);
	if (!call->helper)
		return -ENOENT;
	tfd_stage_helper_remove(worker->group->stages, call->helper);
	return 0;
}

static int stat_command(struct tfd_worker *worker, void *argument)
{
	struct stage_call *call = argument;
	const struct tfd_stage_helper *helper = tfd_stage_helper_find(worker->group->stages, call->stage);

	if (!helper)
		return -ENOENT;
	call->info = helper->info;
	call->info.state = tfd_load_relaxed(&helper->shared->state);
	call->info.waiting = 0;
	for (uint32_t i = 0; i < TFD_STAGE_RINGS; i++)
		call->info.waiting += helper->queues[i].tail - helper->queues[i].told;
	return 0;
}

static int memory_command(struct tfd_worker *worker, void *argument)
{
	struct stage_call *call = argument;
	struct tfd_stages *stages = worker->group->stages;
	struct tfd_stage_helper *helper = call->stage ? tfd_stage_helper_find(stages, call->stage) : NULL;

	if (call->stage && !helper)
		return -ENOENT;
	return tfd_stage_memory_tell(stages, call->memory, helper);
}

static int forget_command(struct tfd_worker *worker, void *argument)
{
	struct stage_call *call = argument;

	tfd_stage_memory_drop(worker->group->stages, call->memory);
	return 0;
}

int tfd_stage_open(struct tfd_core *core, uint32_t group, uint64_t *stage, struct tfd_stage_fds *fds,
                   struct tfd_error *error)
{
	struct stage_call call = { 0 };
	struct tfd_stages *stages;
	uint64_t name;
	int rc;

	if (group >= core->group_count || !core->groups[group]->stages)
		return tfd_fail(error, -ENOTSUP, "domain group %u has no staged rails", group);
	stages = core->groups[group]->stages;
	name = tfd_add_seq(&stages->last_name, 1) + 1;
	rc = tfd_stage_helper_make(stages, name, &call.helper, fds, error);
	if (rc)
		return rc;
	(void)call_run(core, group, add_command, &call);
	*stage = name;
	return 0;
}

int tfd_stage_close(struct tfd_core *core, uint32_t group, uint64_t stage)
{
	struct stage_call call = { .stage = stage };
	int rc = call_run(core, group, close_command, &call);

	if (!rc)
		tfd_stage_helper_free(call.helper);
	return rc;
}

int tfd_stage_stat(struct tfd_core *core, uint32_t group, uint64_t stage, struct tfd_stage_info *out)
{
	struct stage_call call = { .stage = stage };
	int rc = call_run(core, group, stat_command, &call);

	if (!rc)
		*out = call.info;
	return rc;
}

int tfd_stage_memory_set(struct tfd_core *core, uint32_t group, uint64_t memory, uint64_t stage)
{
	struct stage_call call = { .memory = memory, .stage = stage };

	return stage ? call_run(core, group, memory_command, &call) : -ENOENT;
}

int tfd_stage_memory_fail(struct tfd_core *core, uint32_t group, uint64_t memory)
{
	struct stage_call call = { .memory = memory };

	return call_run(core, group, memory_command, &call);
}

int tfd_stage_memory_forget(struct tfd_core *core, uint32_t group, uint64_t memory)
{
	struct stage_call call = { .memory = memory };

	return call_run(core, group, forget_command, &call);
}
