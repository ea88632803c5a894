/* SPDX-License-Identifier: Apache-2.0 */
/* Paths: what a queue pair is joined by, and address handles, which only tell whether there is one. */
#include "soft.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct soft_ah {
	struct ibv_ah ah; /* first */
};

/* fabric.lock. As the kernel asks the network. */
static int is_known(uint32_t type, const union ibv_gid *gid)
{
	for (uint32_t i = 0; i < SOFT_DEVICES * fabric.config.ports; i++) {
		const struct soft_device *device = &fabric.devices[i / fabric.config.ports];
		const struct soft_port *port = &device->ports[i % fabric.config.ports];

		for (uint32_t at = 0; at < SOFT_GIDS && !device->removed && port->up && !device->cut; at++) {
			if (port->gids[at].used && port->gids[at].type == type &&
			    memcmp(&port->gids[at].gid, gid, sizeof(*gid)) == 0)
				return 1;
		}
	}
	return 0;
}

int soft_path_check(const struct soft_device *device, const struct ibv_ah_attr *path)
{
	const struct soft_port *port;

	if (!path->port_num || path->port_num > fabric.config.ports)
		return soft_refuse(EINVAL, "a path by port %u of %u", path->port_num, fabric.config.ports);
	port = &device->ports[path->port_num - 1];
	if (path->sl > (fabric.config.infiniband ? 15 : 7))
		return soft_refuse(EINVAL, "a path of service level %u", path->sl);
	if (!path->is_global && fabric.config.infiniband)
		return path->dlid ? 0 : soft_refuse(EINVAL, "a path to LID 0");
	if (!path->is_global)
		return soft_refuse(EINVAL, "a path by RoCE needs a global route");
	if (path->grh.sgid_index >= SOFT_GIDS || !port->gids[path->grh.sgid_index].used)
		return soft_refuse(EINVAL, "a path by GID %u: there is none", path->grh.sgid_index);
	if (!fabric.config.infiniband && !path->grh.hop_limit)
		return soft_refuse(EINVAL, "a path with a hop limit of 0 goes nowhere");
	if (!fabric.config.infiniband && !is_known(port->gids[path->grh.sgid_index].type, &path->grh.dgid))
		return soft_refuse(ETIMEDOUT, "a path to a GID that nobody has who can be reached");
	return 0;
}

SOFT_EXPORT struct ibv_ah *ibv_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *path)
{
	struct soft_context *context = soft_context_of(pd->context);
	struct soft_ah *ah;
	int error;

	if (soft_fails(context, "ibv_create_ah"))
		return NULL;
	ah = calloc(1, sizeof(*ah));
	if (!ah)
		return NULL;
	ah->ah = (struct ibv_ah){ .context = pd->context, .pd = pd };
	soft_lock();
	error = soft_path_check(context->device, path);
	if (!error) {
		((struct soft_pd *)pd)->users++;
		context->objects++;
	}
	soft_unlock();
	if (!error)
		return &ah->ah;
	free(ah);
	errno = error;
	return NULL;
}

SOFT_EXPORT int ibv_destroy_ah(struct ibv_ah *ah)
{
	if (soft_fails(NULL, "ibv_destroy_ah"))
		return errno;
	soft_lock();
	((struct soft_pd *)ah->pd)->users--;
	soft_context_of(ah->context)->objects--;
	soft_unlock();
	free(ah);
	return 0;
}
