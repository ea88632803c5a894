/* SPDX-License-Identifier: Apache-2.0 */
/* The core as a whole, and its domain groups. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../providers/staged/staged.h"
#include "barrier.h"
#include "parts.h"

#define SEGMENT_BYTES_DEFAULT (1u << 20)
#define CUT_BYTES_DEFAULT (64u << 10)
#define WINDOW_BYTES_DEFAULT (4u << 20)
#define PATIENCE_NS 5000000000u
#define STAGED_PATIENCE_NS 15000000000u /* a helper that does nothing has to be ended first */

int tfd_core_open(const struct tfd_core_options *options, struct tfd_core **out, struct tfd_error *error)
{
	struct tfd_core *core;
	int rc;

	if (!options->max_sessions || options->max_sessions >= TFD_NAME_SPACES)
		return tfd_fail(error, -EINVAL, "max_sessions is %u; it must be 1 to %u",
		                options->max_sessions, TFD_NAME_SPACES - 1);
	core = calloc(1, sizeof(*core));
	if (!core)
		return tfd_fail(error, -ENOMEM, "no memory for the core");
	tfd_crc32c_init();
	core->options = *options;
	(void)pthread_mutex_init(&core->lock, NULL);
	(void)pthread_cond_init(&core->refs_changed, NULL);
	rc = tfd_events_open(core);
	if (rc)
		goto err_free;
	rc = tfd_waker_open(core);
	if (rc)
		goto err_events;
	*out = core;
	return 0;

err_events:
	tfd_waker_close(core);
	tfd_events_close(core);
err_free:
	free(core);
	return tfd_fail(error, rc, "the core cannot start: %s", strerror(-rc));
}

static void group_close(struct tfd_group *group)
{
	for (uint32_t i = 0; i < group->rail_count; i++)
		group->rails[i].ops->domain_close(group->rails[i].domain);
	tfd_stages_close(group->stages);
	free(group);
}

void tfd_core_close(struct tfd_core *core)
{
	if (!core)
		return;
	tfd_heartbeat_close(core);
	for (uint32_t i = 0; i < core->conns.capacity; i++) {
		struct tfd_conn *conn = core->conns.items ? core->conns.items[i] : NULL;

		if (conn)
			tfd_conn_drop(core, conn->handle);
	}
	for (uint32_t i = 0; i < core->group_count; i++)
		tfd_worker_close(core->groups[i]->worker);
	tfd_sessions_close_all(core);
	tfd_waker_close(core);
	for (uint32_t i = 0; i < core->group_count; i++)
		group_close(core->groups[i]);
	tfd_events_close(core);
	tfd_table_fini(&core->sessions);
	tfd_table_fini(&core->conns);
	(void)pthread_cond_destroy(&core->refs_changed);
	(void)pthread_mutex_destroy(&core->lock);
	free(core);
}

int tfd_core_step(struct tfd_core *core, uint64_t now_ns)
{
	int did = 0;

	for (uint32_t i = 0; i < core->group_count; i++) {
		core->groups[i]->worker->now_ns = now_ns;
		did += tfd_worker_poll_hot(core->groups[i]->worker) != 0;
	}
	tfd_waker_drain(core);
	return did;
}

/* ---- domain groups ---- */

static const struct tfd_provider_ops *const providers[] = {
	&tfd_libfabric_ops, &tfd_local_ops, &tfd_sim_ops, &tfd_staged_ops, &tfd_tcp_ops, &tfd_verbs_ops,
};

const struct tfd_provider_ops *tfd_provider_find(const char *name)
{
	for (size_t i = 0; i < sizeof(providers) / sizeof(providers[0]); i++) {
		if (strcmp(providers[i]->name, name) == 0)
			return providers[i];
	}
	return NULL;
}

/* `staged`: one over a rail of that provider. */
static int rail_open(struct tfd_group *group, const struct tfd_provider_ops *ops, bool staged,
                     const struct tfd_group_options *options, const char *name, struct tfd_error *error)
{
	struct tfd_rail *rail = &group->rails[group->rail_count];
	int rc;

	rail->index = group->rail_count;
	for (uint32_t i = 0; i < TFD_KEY_BUCKETS; i++)
		tfd_list_init(&rail->regions[i]);
	for (uint32_t i = 0; i < TFD_CLASSES; i++)
		tfd_list_init(&rail->round[i]);
	rail->pace.bulk_most = UINT64_MAX;
	rail->pace.boost = TFD_BOOST_ONE;
	rail->wait_fd = -1;
	rail->ops = staged ? &tfd_staged_ops : ops;
	rail->last_resort = staged;
	rail->patience_ns = staged ? STAGED_PATIENCE_NS : PATIENCE_NS;
	rc = staged ? tfd_staged_domain_open(group->stages, ops, options, name, &rail->info, &rail->domain,
	                                     error) :
	              ops->domain_open(options, name, &rail->info, &rail->domain, error);
	if (rc)
		return rc;
	group->rail_count++; /* from here on its domain is the group's to close */
	if (rail->info.max_message_bytes < TFD_REQUEST_BYTES)
		return tfd_fail(error, -ENOTSUP,
		                "rail %s: %s carries at most %llu bytes at once, and messages between "
		                "daemons take %zu: use another provider",
		                name, rail->info.provider, (unsigned long long)rail->info.max_message_bytes,
		                TFD_REQUEST_BYTES);
	if (rail->info.channels > 1 && rail->info.channels != TFD_CHANNELS_MAX)
		return tfd_fail(error, -EPROTO,
		                "rail %s: %s says that a connection has %u channels: report this", name,
		                rail->info.provider, rail->info.channels);
	rail->orders = rail->info.channels ? rail->info.channels : 1;
	rail->info.state = TFD_RAIL_UP;
	rail->credits_free = rail->info.imm_depth;
	rail->segment_bytes = options->segment_bytes ? options->segment_bytes : SEGMENT_BYTES_DEFAULT;
	if (rail->info.max_message_bytes < rail->segment_bytes)
		rail->segment_bytes = rail->info.max_message_bytes;
	return 0;
}

static int rails_open(struct tfd_group *group, const struct tfd_provider_ops *ops,
                      const struct tfd_group_options *options, struct tfd_error *error)
{
	int rc = options->staging_bytes ? tfd_group_stages_open(group, options->staging_bytes, error) : 0;
	bool staged = false;

	do {
		for (uint32_t i = 0; !rc && i < options->rail_count && group->rail_count < TFD_MAX_RAILS; i++)
			rc = rail_open(group, ops, staged, options, options->rails[i], error);
		if (!rc && options->with_local && group->rail_count < TFD_MAX_RAILS)
			rc = rail_open(group, &tfd_local_ops, staged, options, "local", error);
		staged = !staged;
	} while (!rc && staged && group->stages);
	return rc;
}

int tfd_group_open(struct tfd_core *core, const struct tfd_group_options *options, uint32_t *index,
                   struct tfd_error *error)
{
	const struct tfd_provider_ops *ops = tfd_provider_find(options->provider);
	struct tfd_group *group;
	int rc;

	if (!ops)
		return tfd_fail(error, -ENOENT,
		                "there is no provider \"%s\"; this build has: libfabric, local, sim, staged, "
		                "tcp, verbs",
		                options->provider);
	if (!options->rail_count || options->rail_count > TFD_MAX_NICS)
		return tfd_fail(error, -EINVAL, "%u rails; a domain group has 1 to %u", options->rail_count,
		                TFD_MAX_NICS);
	if (core->group_count == TFD_MAX_RAILS)
		return tfd_fail(error, -ENOSPC, "the daemon has all its %u domain groups", TFD_MAX_RAILS);
	group = calloc(1, sizeof(*group));
	if (!group)
		return tfd_fail(error, -ENOMEM, "no memory for a domain group");
	group->core = core;
	group->index = core->group_count;
	group->cut_bytes = options->cut_bytes ? options->cut_bytes : CUT_BYTES_DEFAULT;
	group->segment_given = options->segment_bytes != 0;
	group->window_bytes = options->window_bytes ? options->window_bytes : WINDOW_BYTES_DEFAULT;
	rc = rails_open(group, ops, options, error);
	if (!rc) {
		rc = tfd_guard_install(); /* after the provider's library, which may bring a handler of its own */
		if (rc)
			(void)tfd_fail(error, rc, "no SIGBUS handler: %s", strerror(-rc));
	}
	if (!rc)
		rc = tfd_worker_open(core, group, error);
	if (rc) {
		group_close(group);
		return rc;
	}
	core->groups[core->group_count++] = group;
	*index = group->index;
	return 0;
}

int tfd_group_rail_count(struct tfd_core *core, uint32_t group, uint32_t *count)
{
	if (group >= core->group_count)
		return -ENOENT;
	*count = core->groups[group]->rail_count;
	return 0;
}

int tfd_group_rail(struct tfd_core *core, uint32_t group, uint32_t rail, struct tfd_rail_info *out)
{
	const struct tfd_rail_info *info;

	if (group >= core->group_count || rail >= core->groups[group]->rail_count)
		return -ENOENT;
	info = &core->groups[group]->rails[rail].info;
	memcpy(out->name, info->name, sizeof(out->name));
	memcpy(out->provider, info->provider, sizeof(out->provider));
	memcpy(out->protocol, info->protocol, sizeof(out->protocol));
	memcpy(out->why, info->why, sizeof(out->why));
	out->max_message_bytes = info->max_message_bytes;
	out->ordered = info->ordered;
	out->max_parts = info->max_parts;
	out->state = tfd_rail_state(&core->groups[group]->rails[rail]);
	out->bytes_sent = tfd_load_relaxed(&info->bytes_sent);
	out->writes_sent = tfd_load_relaxed(&info->writes_sent);
	out->imms_received = tfd_load_relaxed(&info->imms_received);
	out->errors = tfd_load_relaxed(&info->errors);
	out->imm_depth = info->imm_depth;
	out->channels = info->channels;
	out->credit_stalls = tfd_load_relaxed(&info->credit_stalls);
	out->credit_floods = tfd_load_relaxed(&info->credit_floods);
	return 0;
}
