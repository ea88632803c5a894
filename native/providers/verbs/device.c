/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which device, port and GID a rail is: ibv_get_device_list(3), ibv_query_port(3), ibv_query_gid_table(3).
 *
 * A rail is named by a device ("mlx5_0"), a device and a port ("mlx5_0:2"), or an interface or address that a GID belongs to
 * ("eth0", "10.9.0.1").
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../core/barrier.h"
#include "../../core/parts.h"
#include "verbs.h"

#define GIDS_MAX 1024
#define ROCE_LEVELS 8u /* priorities of Ethernet */
#define PKEY_DEFAULT 0xffffu
#define PKEY_MEMBER 0x8000u /* a full one */

/* A table of GIDs of one device, as the library tells it. */
struct table {
	struct ibv_gid_entry entries[GIDS_MAX];
	struct tfd_gid gids[GIDS_MAX]; /* of one port */
	size_t entry_count;
	size_t count;
};

/* What a rail's name asks for. */
struct wanted {
	char device[TFD_NAME_MAX];
	uint32_t port; /* 0: any */
	const char *gid; /* an interface or address; NULL: the name is a device's */
};

int tfd_verbs_port_query(const struct tfd_domain *domain, uint8_t number, struct ibv_port_attr *out)
{
	struct verbs_context *extended = verbs_get_ctx_op(domain->context, query_port);
	int rc;

	memset(out, 0, sizeof(*out));
	if (extended)
		rc = extended->query_port(domain->context, number, out, sizeof(*out));
	else
		rc = domain->library->query_port(domain->context, number, (void *)out);
	return rc > 0 ? -rc : rc;
}

/* 0: it is none. */
static enum ibv_mtu mtu_of(uint32_t bytes)
{
	for (enum ibv_mtu mtu = IBV_MTU_256; mtu <= IBV_MTU_4096; mtu++) {
		if (128u << mtu == bytes)
			return mtu;
	}
	return 0;
}

static int table_read(const struct tfd_domain *domain, struct table *table)
{
	ssize_t count = domain->library->query_gid_table(domain->context, table->entries, GIDS_MAX, 0,
	                                                 sizeof(table->entries[0]));

	if (count < 0)
		return (int)count;
	table->entry_count = (size_t)count;
	return 0;
}

static void table_pick(struct table *table, uint32_t port)
{
	table->count = 0;
	for (size_t i = 0; i < table->entry_count; i++) {
		const struct ibv_gid_entry *entry = &table->entries[i];
		struct tfd_gid *gid = &table->gids[table->count];

		if (entry->port_num != port)
			continue;
		memcpy(gid->raw, entry->gid.raw, sizeof(gid->raw));
		gid->index = entry->gid_index;
		gid->type = entry->gid_type;
		gid->netdev[0] = 0;
		if (entry->ndev_ifindex)
			(void)if_indextoname(entry->ndev_ifindex, gid->netdev);
		table->count++;
	}
}

void tfd_verbs_port_take(struct tfd_domain *domain, const struct ibv_port_attr *now)
{
	enum ibv_mtu most = mtu_of(domain->options.mtu);

	domain->port.lid = now->lid;
	domain->port.mtu = most && most < now->active_mtu ? most : now->active_mtu;
}

/* On InfiniBand a GID is the port's for its index: its first half is the subnet's, which a subnet manager may change. */
static bool is_own(const struct tfd_verbs_port *port, const struct ibv_gid_entry *entry)
{
	if (entry->port_num != port->number || entry->gid_index > TFD_GID_INDEX_MAX)
		return false;
	if (port->link_layer == IBV_LINK_LAYER_INFINIBAND)
		return entry->gid_index == port->gid.index;
	return entry->gid_type == port->gid.type &&
	       memcmp(entry->gid.raw, port->gid.raw, sizeof(entry->gid.raw)) == 0;
}

int tfd_verbs_gid_take(struct tfd_domain *domain)
{
	struct table *table;
	int rc = -ENOENT;

	if (domain->port.link_layer != IBV_LINK_LAYER_INFINIBAND || !domain->port.global)
		return 0;
	table = calloc(1, sizeof(*table));
	if (!table)
		return -ENOMEM;
	if (table_read(domain, table) != 0)
		table->entry_count = 0;
	for (size_t i = 0; i < table->entry_count; i++) {
		if (!is_own(&domain->port, &table->entries[i]))
			continue;
		memcpy(domain->port.gid.raw, table->entries[i].gid.raw, sizeof(domain->port.gid.raw));
		rc = 0;
	}
	free(table);
	return rc;
}

/* Of several entries alike (one of each VLAN) the one that it was. */
int tfd_verbs_gid_find(const struct tfd_domain *domain)
{
	uint32_t was = tfd_load_relaxed(&domain->port.gid_index);
	struct table *table = calloc(1, sizeof(*table));
	int rc = table ? table_read(domain, table) : -ENOMEM;
	int found = -ENOENT;

	for (size_t i = 0; !rc && i < table->entry_count && found != (int)was; i++) {
		const struct ibv_gid_entry *entry = &table->entries[i];

		if (is_own(&domain->port, entry))
			found = (int)entry->gid_index;
	}
	free(table);
	return found;
}

/* ---- the port ---- */

static bool port_matches(struct table *table, uint32_t port, const struct wanted *wanted)
{
	if (!wanted->gid)
		return true;
	table_pick(table, port);
	for (size_t i = 0; i < table->count; i++) {
		if (tfd_gid_is(&table->gids[i], wanted->gid))
			return true;
	}
	return false;
}

/* The first that is active, else the first that there is: it may become active. 0: none fits. */
static uint8_t port_choose(const struct tfd_domain *domain, struct table *table, const struct wanted *wanted)
{
	uint8_t found = 0;

	for (uint32_t port = 1; port <= domain->attributes.phys_port_cnt; port++) {
		struct ibv_port_attr attributes;

		if ((wanted->port && port != wanted->port) || !port_matches(table, port, wanted))
			continue;
		if (tfd_verbs_port_query(domain, (uint8_t)port, &attributes) != 0)
			continue;
		if (attributes.state == IBV_PORT_ACTIVE)
			return (uint8_t)port;
		if (!found)
			found = (uint8_t)port;
	}
	return found;
}

/* The better the higher. Limited members of a partition talk to its full members only, and not to each other. */
static uint32_t pkey_rank(uint32_t pkey, uint32_t wanted)
{
	if ((pkey | PKEY_MEMBER) != (wanted | PKEY_MEMBER))
		return pkey != 0;
	return pkey & PKEY_MEMBER ? 3 : 2;
}

static int pkey_choose(const struct tfd_domain *domain, struct tfd_verbs_port *port, uint32_t length,
                       uint32_t *pkey, struct tfd_error *error)
{
	uint32_t wanted = domain->options.pkey ? domain->options.pkey : PKEY_DEFAULT;
	uint32_t best = 0;

	for (uint32_t i = 0; i < length; i++) {
		__be16 raw;
		uint32_t rank;

		if (domain->library->query_pkey(domain->context, port->number, (int)i, &raw) != 0)
			continue;
		rank = pkey_rank(ntohs(raw), wanted);
		if (rank <= best)
			continue;
		best = rank;
		*pkey = ntohs(raw);
		port->pkey_index = (uint16_t)i;
	}
	if (!best || (domain->options.pkey && best == 1))
		return tfd_fail(error, -ENOENT,
		                "port %u has no pkey 0x%04x in its table of %u: ask who runs the subnet, or "
		                "set another",
		                port->number, wanted, length);
	return 0;
}

/* ---- the GID ---- */

static int gid_choose(struct tfd_domain *domain, struct table *table, const struct wanted *wanted,
                      struct tfd_error *error)
{
	const struct tfd_verbs_options *options = &domain->options;
	struct tfd_verbs_port *port = &domain->port;
	const struct tfd_gid *chosen = NULL;
	char text[160];

	table_pick(table, port->number);
	for (size_t i = 0; i < table->count && options->gid_given; i++) {
		if (table->gids[i].index == options->gid_index)
			chosen = &table->gids[i];
	}
	if (!options->gid_given)
		chosen = tfd_gid_choose(table->gids, table->count, options->link_local, wanted->gid);
	if (!options->gid_given && port->link_layer == IBV_LINK_LAYER_INFINIBAND && table->count)
		chosen = &table->gids[0];
	tfd_gids_text(table->gids, table->count, chosen, text, sizeof(text));
	if (!chosen && options->gid_given)
		return tfd_fail(error, -ENOENT, "port %u has no GID with index %u; it has %s", port->number,
		                options->gid_index, text[0] ? text : "none");
	if (!chosen)
		return tfd_fail(
			error, -EADDRNOTAVAIL,
			"port %u has no RoCE v2 GID that can be routed (it has %s): give its interface "
			"an IP address, or allow link-local ones, or name a gid_index",
			port->number, text[0] ? text : "none");
	port->gid = *chosen;
	port->gid_index = chosen->index;
	return 0;
}

static const char *gid_reason(const struct tfd_domain *domain, const struct wanted *wanted)
{
	if (domain->options.gid_given)
		return "as configured";
	if (domain->port.link_layer == IBV_LINK_LAYER_INFINIBAND)
		return "the port's own";
	switch (tfd_gid_rank(&domain->port.gid)) {
	case TFD_GID_IPV4:
		return wanted->gid ? "as the rail's name says" : "the first of an IPv4 address";
	case TFD_GID_IPV6:
		return "the first that can be routed; none is of an IPv4 address";
	default:
		return "link-local as allowed; there is no other";
	}
}

static void explain(const struct tfd_domain *domain, const struct wanted *wanted, struct table *table,
                    uint32_t pkey, struct tfd_rail_info *info)
{
	const struct tfd_verbs_port *port = &domain->port;
	const struct tfd_gid *chosen = NULL;
	char others[160], gid[TFD_GID_TEXT];

	for (size_t i = 0; i < table->count; i++) {
		if (table->gids[i].index == port->gid.index)
			chosen = &table->gids[i];
	}
	tfd_gids_text(table->gids, table->count, chosen, others, sizeof(others));
	tfd_gid_text(&port->gid, gid);
	(void)snprintf(info->why, sizeof(info->why),
	               "%s port %u, GID index %u: %s%s%s, %s; MTU %u, pkey 0x%04x. Passed over: %s.",
	               domain->library->get_device_name(domain->context->device), port->number,
	               port->gid.index, gid, port->gid.netdev[0] ? " of " : "", port->gid.netdev,
	               gid_reason(domain, wanted), 128u << port->mtu, pkey, others[0] ? others : "none");
}

/* A device would take another one in its place, which switches may treat as they please. */
static int levels_check(const struct tfd_domain *domain, struct tfd_error *error)
{
	const struct tfd_verbs_options *options = &domain->options;
	bool bulk = options->service_level < ROCE_LEVELS;
	uint32_t level = bulk ? options->bulk_service_level : options->service_level;

	if (domain->port.link_layer != IBV_LINK_LAYER_ETHERNET || level < ROCE_LEVELS)
		return 0;
	return tfd_fail(error, -EINVAL, "%sservice_level is %u; RoCE has 0 to %u", bulk ? "bulk_" : "", level,
	                ROCE_LEVELS - 1);
}

/* ---- the device ---- */

static int port_open(struct tfd_domain *domain, struct table *table, const struct wanted *wanted,
                     struct tfd_rail_info *info, struct tfd_error *error)
{
	struct tfd_verbs_port *port = &domain->port;
	struct ibv_port_attr attributes;
	uint32_t pkey = 0;
	int rc = tfd_verbs_port_query(domain, port->number, &attributes);

	if (rc)
		return tfd_fail(error, rc, "port %u cannot be asked: %s", port->number, strerror(-rc));
	if (domain->options.mtu && !mtu_of(domain->options.mtu))
		return tfd_fail(error, -EINVAL, "mtu is %u; it must be 256, 512, 1024, 2048 or 4096",
		                domain->options.mtu);
	port->link_layer = attributes.link_layer == IBV_LINK_LAYER_ETHERNET ? IBV_LINK_LAYER_ETHERNET :
	                                                                      IBV_LINK_LAYER_INFINIBAND;
	port->global = port->link_layer == IBV_LINK_LAYER_ETHERNET || domain->options.gid_given ||
	               (attributes.flags & IBV_QPF_GRH_REQUIRED);
	tfd_verbs_port_take(domain, &attributes);
	port->max_message_bytes = attributes.max_msg_sz;
	rc = levels_check(domain, error);
	if (!rc)
		rc = gid_choose(domain, table, wanted, error);
	if (!rc)
		rc = pkey_choose(domain, port, attributes.pkey_tbl_len, &pkey, error);
	if (rc)
		return rc;
	explain(domain, wanted, table, pkey, info);
	domain->state = attributes.state == IBV_PORT_ACTIVE ? TFD_RAIL_UP : TFD_RAIL_DOWN;
	return 0;
}

/* Whether the rail's name means this device: then a port of it is chosen. */
static bool device_matches(struct tfd_domain *domain, struct table *table, const struct wanted *wanted)
{
	const char *name = domain->library->get_device_name(domain->context->device);

	if (!wanted->gid && strcmp(name, wanted->device) != 0)
		return false;
	if (domain->library->query_device(domain->context, &domain->attributes) != 0 ||
	    table_read(domain, table) != 0)
		return false;
	domain->port.number = port_choose(domain, table, wanted);
	return domain->port.number != 0;
}

static bool device_find(struct tfd_domain *domain, struct ibv_device **devices, struct table *table,
                        const struct wanted *wanted)
{
	for (size_t i = 0; devices[i]; i++) {
		domain->context = domain->library->open_device(devices[i]);
		if (!domain->context)
			continue;
		if (device_matches(domain, table, wanted))
			return true;
		(void)domain->library->close_device(domain->context);
		domain->context = NULL;
	}
	return false;
}

static int no_device(const struct tfd_domain *domain, struct ibv_device **devices, const char *name,
                     struct tfd_error *error)
{
	char names[120] = "";
	size_t used = 0;

	for (size_t i = 0; devices[i] && used + TFD_NAME_MAX < sizeof(names); i++)
		used += (size_t)snprintf(names + used, sizeof(names) - used, "%s%.60s", i ? ", " : "",
		                         domain->library->get_device_name(devices[i]));
	if (!names[0])
		return tfd_fail(error, -ENODEV,
		                "rail %s: this host has no RDMA device: load its driver, or make a soft one "
		                "(modprobe rdma_rxe; rdma link add rxe0 type rxe netdev eth0)",
		                name);
	return tfd_fail(error, -ENODEV,
	                "rail %s: no RDMA device, port, or interface or address of one, has this name; the "
	                "devices are %s (`rdma link` lists them)",
	                name, names);
}

/* "mlx5_0", "mlx5_0:2"; an address may have colons, too. */
static void parse_device(const char *name, uint32_t port, struct wanted *out)
{
	const char *colon = strrchr(name, ':');
	unsigned long number;
	char *end;

	*out = (struct wanted){ .port = port };
	(void)snprintf(out->device, sizeof(out->device), "%s", name);
	if (!colon || strchr(name, ':') != colon || !colon[1])
		return;
	number = strtoul(colon + 1, &end, 10);
	if (*end || !number || number > UINT8_MAX) /* no port: no device has this name */
		return;
	out->port = (uint32_t)number;
	out->device[colon - name] = 0;
}

int tfd_verbs_device_open(struct tfd_domain *domain, const struct tfd_group_options *options,
                          const char *name, struct tfd_rail_info *info, struct tfd_error *error)
{
	struct ibv_device **devices = domain->library->get_device_list(NULL);
	struct table *table = calloc(1, sizeof(*table));
	struct wanted wanted;
	int rc = 0;

	if (!devices || !table) {
		rc = devices ? ENOMEM : errno;
		rc = tfd_fail(error, rc == ENOMEM ? -rc : -ENODEV,
		              "rail %s: RDMA devices cannot be listed: %s: this kernel has no RDMA, or its "
		              "module is not loaded (modprobe ib_uverbs)",
		              name, strerror(rc));
		goto out;
	}
	parse_device(name, options->verbs.port, &wanted);
	if (!device_find(domain, devices, table, &wanted)) {
		wanted = (struct wanted){ .port = options->verbs.port, .gid = name };
		if (!device_find(domain, devices, table, &wanted))
			rc = no_device(domain, devices, name, error);
	}
	if (!rc)
		rc = port_open(domain, table, &wanted, info, error);
out:
	if (devices)
		domain->library->free_device_list(devices);
	free(table);
	return rc;
}
