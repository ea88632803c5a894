/* SPDX-License-Identifier: Apache-2.0 */
/* The device list, opening and closing, and what a device says of itself. */
#include "soft.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "core/barrier.h"

#undef ibv_get_device_list
SOFT_EXPORT struct ibv_device **ibv_get_device_list(int *count)
{
	struct ibv_device **list;
	int found = 0;

	if (soft_fails(NULL, "ibv_get_device_list"))
		return NULL;
	list = calloc(SOFT_DEVICES + 1, sizeof(struct ibv_device *));
	if (!list)
		return NULL;
	soft_lock();
	soft_configure_once();
	for (uint32_t i = 0; i < SOFT_DEVICES; i++) {
		if (!fabric.devices[i].removed)
			list[found++] = &fabric.devices[i].device;
	}
	soft_unlock();
	if (count)
		*count = found;
	return list;
}

SOFT_EXPORT void ibv_free_device_list(struct ibv_device **list)
{
	free(list);
}

SOFT_EXPORT const char *ibv_get_device_name(struct ibv_device *device)
{
	return device->name;
}

SOFT_EXPORT __be64 ibv_get_device_guid(struct ibv_device *device)
{
	return htobe64(0x0200000000000000ull + (uint64_t)((struct soft_device *)device - fabric.devices));
}

static uint32_t fork_guarded; /* fabric.lock; as in the library, for the life of the process */

SOFT_EXPORT int ibv_fork_init(void)
{
	int error = soft_fails(NULL, "ibv_fork_init");

	soft_lock();
	for (uint32_t i = 0; i < SOFT_DEVICES && !fork_guarded && !error; i++) {
		if (fabric.devices[i].counts.mrs)
			error = soft_refuse(EINVAL, "ibv_fork_init: memory is registered already");
	}
	fork_guarded |= !error;
	soft_unlock();
	return error;
}

/* A kernel that copies no pinned pages. */
SOFT_EXPORT enum ibv_fork_status ibv_is_fork_initialized(void)
{
	enum ibv_fork_status status;

	soft_lock();
	status = fork_guarded ? IBV_FORK_ENABLED : IBV_FORK_DISABLED;
	soft_unlock();
	return status;
}

static int query_device_ex(struct ibv_context *context, const struct ibv_query_device_ex_input *input,
                           struct ibv_device_attr_ex *attr, size_t size);
static int query_port(struct ibv_context *context, uint8_t number, struct ibv_port_attr *attr, size_t size);

static void context_fill(struct soft_context *soft)
{
	struct ibv_context *context = &soft->verbs.context;
	int null = fabric.config.mode == SOFT_NULL;

	context->device = &soft->device->device;
	context->cmd_fd = -1;
	context->async_fd = soft->events.fd;
	context->num_comp_vectors = 1;
	context->abi_compat = __VERBS_ABI_IS_EXTENDED;
	(void)pthread_mutex_init(&context->mutex, NULL);
	context->ops.poll_cq = null ? soft_null_poll : soft_cq_poll;
	context->ops.req_notify_cq = soft_cq_arm;
	context->ops.post_srq_recv = null ? soft_null_srq_post : soft_srq_post;
	context->ops.post_send = null ? soft_null_send : soft_post_send;
	soft->verbs.sz = sizeof(soft->verbs);
	soft->verbs.query_device_ex = query_device_ex;
	soft->verbs.query_port = query_port;
	if (fabric.config.extended)
		soft->verbs.create_qp_ex = soft_qp_create_ex;
}

SOFT_EXPORT struct ibv_context *ibv_open_device(struct ibv_device *device)
{
	struct soft_context *soft;

	if (soft_fails(NULL, "ibv_open_device"))
		return NULL;
	soft = calloc(1, sizeof(*soft));
	if (!soft)
		return NULL;
	if (soft_inbox_open(&soft->events)) {
		free(soft);
		return NULL;
	}
	soft_lock();
	soft->device = (struct soft_device *)device;
	if (soft->device->removed) {
		soft_unlock();
		soft_inbox_close(&soft->events);
		free(soft);
		errno = ENODEV;
		return NULL;
	}
	context_fill(soft);
	if (!fabric.contexts && fabric.config.mode == SOFT_THREADED)
		soft_engine_start();
	soft->next = fabric.contexts;
	fabric.contexts = soft;
	soft->device->counts.contexts++;
	soft_unlock();
	return &soft->verbs.context;
}

SOFT_EXPORT int ibv_close_device(struct ibv_context *context)
{
	struct soft_context *soft = soft_context_of(context);
	struct soft_context **at = &fabric.contexts;
	int last;

	soft_lock();
	if (soft->objects)
		soft_abort("ibv_close_device: %u objects of it were not destroyed", soft->objects);
	while (*at && *at != soft)
		at = &(*at)->next;
	if (!*at)
		soft_abort("ibv_close_device: %p is not open", (void *)context);
	*at = soft->next;
	soft->device->counts.contexts--;
	last = !fabric.contexts;
	soft_unlock();
	if (last && fabric.config.mode == SOFT_THREADED)
		soft_engine_stop();
	soft_inbox_close(&soft->events);
	(void)pthread_mutex_destroy(&context->mutex);
	free(soft);
	return 0;
}

SOFT_EXPORT int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
	const struct soft_config *config = &fabric.config;

	if (soft_fails(soft_context_of(context), "ibv_query_device"))
		return errno;
	*attr = (struct ibv_device_attr){
		.fw_ver = "soft",
		.node_guid = ibv_get_device_guid(context->device),
		.max_mr_size = UINT64_MAX,
		.page_size_cap = 0xfffff000u,
		.vendor_id = config->vendor,
		.max_qp = (int)config->max_qp,
		.max_qp_wr = (int)config->max_qp_wr,
		.max_sge = (int)config->max_sge,
		.max_sge_rd = (int)config->max_sge,
		.max_cq = 1024,
		.max_cqe = (int)config->max_cqe,
		.max_mr = SOFT_MRS - 1,
		.max_pd = 1024,
		.max_qp_rd_atom = (int)config->max_rd_atomic,
		.max_res_rd_atom = (int)(config->max_rd_atomic * config->max_qp),
		.max_qp_init_rd_atom = (int)config->max_rd_atomic,
		.max_srq = 1024,
		.max_srq_wr = (int)config->max_srq_wr,
		.max_srq_sge = 1,
		.max_pkeys = SOFT_PKEYS,
		.local_ca_ack_delay = 15,
		.phys_port_cnt = (uint8_t)config->ports,
	};
	return 0;
}

static int query_device_ex(struct ibv_context *context, const struct ibv_query_device_ex_input *input,
                           struct ibv_device_attr_ex *attr, size_t size)
{
	if (size < sizeof(*attr) || (input && input->comp_mask))
		return soft_refuse(EINVAL, "ibv_query_device_ex: %zu bytes", size);
	memset(attr, 0, size);
	attr->phys_port_cnt_ex = fabric.config.ports;
	return ibv_query_device(context, &attr->orig_attr);
}

static int query_port(struct ibv_context *context, uint8_t number, struct ibv_port_attr *attr, size_t size)
{
	struct soft_context *soft = soft_context_of(context);
	const struct soft_port *port;

	if (soft_fails(soft, "ibv_query_port"))
		return errno;
	if (!number || number > fabric.config.ports)
		return soft_refuse(EINVAL, "ibv_query_port: port %u of %u", number, fabric.config.ports);
	memset(attr, 0, size);
	soft_lock();
	port = &soft->device->ports[number - 1];
	*attr = (struct ibv_port_attr){
		.state = port->up ? IBV_PORT_ACTIVE : IBV_PORT_DOWN,
		.max_mtu = IBV_MTU_4096,
		.active_mtu = (enum ibv_mtu)port->mtu,
		.gid_tbl_len = SOFT_GIDS,
		.max_msg_sz = 1u << 30,
		.pkey_tbl_len = SOFT_PKEYS,
		.flags = fabric.config.grh ? IBV_QPF_GRH_REQUIRED : 0,
		.lid = port->lid,
		.max_vl_num = 1,
		.active_width = 2, /* 4X */
		.active_speed = 32, /* EDR: 100 Gbit/s */
		.phys_state = port->up ? 5 : 3, /* LinkUp, Disabled */
		.link_layer = fabric.config.infiniband ? IBV_LINK_LAYER_INFINIBAND : IBV_LINK_LAYER_ETHERNET,
	};
	soft_unlock();
	return 0;
}

#undef ibv_query_port
SOFT_EXPORT int ibv_query_port(struct ibv_context *context, uint8_t number,
                               struct _compat_ibv_port_attr *attr)
{
	struct ibv_port_attr whole;
	int failed = query_port(context, number, &whole, sizeof(whole));

	if (!failed)
		memcpy(attr, &whole, offsetof(struct ibv_port_attr, port_cap_flags2));
	return failed;
}

/* fabric.lock. NULL: there is no such entry. */
static const struct soft_gid *gid_at(struct ibv_context *context, uint32_t port, uint32_t index)
{
	if (!port || port > fabric.config.ports || index >= SOFT_GIDS)
		return NULL;
	return &soft_context_of(context)->device->ports[port - 1].gids[index];
}

SOFT_EXPORT int ibv_query_gid(struct ibv_context *context, uint8_t port, int index, union ibv_gid *gid)
{
	const struct soft_gid *found;

	if (soft_fails(soft_context_of(context), "ibv_query_gid"))
		return -1;
	soft_lock();
	found = gid_at(context, port, (uint32_t)index);
	if (found)
		*gid = found->gid; /* zeros where there is none, as sysfs says */
	soft_unlock();
	return found ? 0 : -1;
}

static void gid_entry(struct ibv_gid_entry *entry, const struct soft_gid *gid, uint32_t port, uint32_t index)
{
	*entry = (struct ibv_gid_entry){
		.gid = gid->gid, .gid_index = index, .port_num = port, .gid_type = gid->type
	};
	entry->ndev_ifindex = fabric.config.infiniband ? 0 : 1;
}

SOFT_EXPORT int _ibv_query_gid_ex(struct ibv_context *context, uint32_t port, uint32_t index,
                                  struct ibv_gid_entry *entry, uint32_t flags, size_t size)
{
	const struct soft_gid *gid;
	int error = 0;

	if (soft_fails(soft_context_of(context), "ibv_query_gid_ex"))
		return errno;
	if (flags || size < sizeof(*entry))
		return soft_refuse(EINVAL, "ibv_query_gid_ex: flags %#x, %zu bytes", flags, size);
	soft_lock();
	gid = gid_at(context, port, index);
	if (!gid)
		error = EINVAL;
	else if (!gid->used)
		error = ENODATA;
	else
		gid_entry(entry, gid, port, index);
	soft_unlock();
	return error;
}

SOFT_EXPORT ssize_t _ibv_query_gid_table(struct ibv_context *context, struct ibv_gid_entry *entries,
                                         size_t max, uint32_t flags, size_t size)
{
	size_t count = 0;

	if (soft_fails(soft_context_of(context), "ibv_query_gid_table"))
		return -errno;
	if (flags || size < sizeof(*entries))
		return -soft_refuse(EINVAL, "ibv_query_gid_table: flags %#x, %zu bytes", flags, size);
	soft_lock();
	for (uint32_t port = 1; port <= fabric.config.ports; port++) {
		for (uint32_t index = 0; index < SOFT_GIDS && count < max; index++) {
			const struct soft_gid *gid = gid_at(context, port, index);

			if (gid && gid->used)
				gid_entry((void *)((uint8_t *)entries + size * count++), gid, port, index);
		}
	}
	soft_unlock();
	return (ssize_t)count;
}

SOFT_EXPORT int ibv_query_pkey(struct ibv_context *context, uint8_t port, int index, __be16 *pkey)
{
	struct soft_context *soft = soft_context_of(context);

	if (soft_fails(soft, "ibv_query_pkey"))
		return -1;
	if (!port || port > fabric.config.ports || index < 0 || (uint32_t)index >= SOFT_PKEYS) {
		errno = EINVAL;
		return -1;
	}
	*pkey = htobe16(soft->device->ports[port - 1].pkeys[index]);
	return 0;
}

SOFT_EXPORT int ibv_get_pkey_index(struct ibv_context *context, uint8_t port, __be16 pkey)
{
	for (int i = 0; i < (int)SOFT_PKEYS; i++) {
		__be16 found;

		if (ibv_query_pkey(context, port, i, &found))
			return -1;
		if (found == pkey)
			return i;
	}
	return -1;
}
