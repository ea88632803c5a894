/* SPDX-License-Identifier: Apache-2.0 */
/* Fabric, domain and address vectors of EFA's face. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#include "face.h"

#define CONTAINER(pointer, type) ((type *)(void *)(pointer)) /* each fid is the first member */

/* ---- fabric ---- */

static int fabric_close(struct fid *fid)
{
	free(CONTAINER(fid, struct face_fabric));
	return 0;
}

int face_no_bind(struct fid *fid, struct fid *other, uint64_t flags)
{
	(void)fid;
	(void)other;
	(void)flags;
	return -FI_ENOSYS;
}

int face_no_control(struct fid *fid, int command, void *argument)
{
	(void)fid;
	(void)command;
	(void)argument;
	return -FI_ENOSYS;
}

static int no_ops(struct fid *fid, const char *name, uint64_t flags, void **ops, void *context)
{
	(void)fid;
	(void)name;
	(void)flags;
	(void)ops;
	(void)context;
	return -FI_EINVAL;
}

static int fabric_trywait(struct fid_fabric *fabric, struct fid **fids, int count)
{
	int rc = 0;

	(void)fabric;
	face_lock();
	for (int i = 0; i < count && !rc; i++)
		rc = face_cq_trywait(CONTAINER(fids[i], struct face_cq));
	face_unlock();
	return rc;
}

/* ---- domain ---- */

static int domain_close(struct fid *fid)
{
	struct face_domain *domain = CONTAINER(fid, struct face_domain);

	if (fi_close(&domain->tcp->fid) || fi_close(&domain->tcp_fabric->fid))
		face_abort("a domain was closed before what is in it");
	face_real.freeinfo(domain->info);
	free(domain);
	return 0;
}

static struct fi_ops domain_fid_ops = {
	.size = sizeof(struct fi_ops),
	.close = domain_close,
	.bind = face_no_bind,
	.control = face_no_control,
	.ops_open = no_ops,
};

static struct fi_ops_domain domain_ops = {
	.size = sizeof(struct fi_ops_domain),
	.av_open = face_av_open,
	.cq_open = face_cq_open,
	.endpoint = face_ep_open,
};

static struct fi_ops_mr mr_ops = {
	.size = sizeof(struct fi_ops_mr),
	.reg = face_mr_reg,
	.regattr = face_mr_regattr,
};

static int domain_open(struct fid_fabric *fabric, struct fi_info *info, struct fid_domain **out,
                       void *context)
{
	const char *ip = face_device_ip(info->domain_attr->name);
	struct face_domain *domain = calloc(1, sizeof(*domain));
	int rc;

	if (!domain)
		return -FI_ENOMEM;
	domain->fabric = CONTAINER(fabric, struct face_fabric);
	face_gid(ip, domain->gid);
	rc = face_tcp_info(ip, &domain->info);
	if (!rc)
		rc = face_real.fabric(domain->info->fabric_attr, &domain->tcp_fabric, NULL);
	if (!rc)
		rc = fi_domain(domain->tcp_fabric, domain->info, &domain->tcp, NULL);
	if (rc) {
		if (domain->tcp_fabric)
			(void)fi_close(&domain->tcp_fabric->fid);
		if (domain->info)
			face_real.freeinfo(domain->info);
		free(domain);
		return rc;
	}
	domain->fid = (struct fid_domain){
		.fid = { .fclass = FI_CLASS_DOMAIN, .context = context, .ops = &domain_fid_ops },
		.ops = &domain_ops,
		.mr = &mr_ops,
	};
	*out = &domain->fid;
	return 0;
}

static struct fi_ops fabric_fid_ops = {
	.size = sizeof(struct fi_ops),
	.close = fabric_close,
	.bind = face_no_bind,
	.control = face_no_control,
	.ops_open = no_ops,
};

static struct fi_ops_fabric fabric_ops = {
	.size = sizeof(struct fi_ops_fabric),
	.domain = domain_open,
	.trywait = fabric_trywait,
};

int face_fabric_open(struct fi_fabric_attr *attr, struct fid_fabric **out, void *context)
{
	struct face_fabric *fabric = calloc(1, sizeof(*fabric));

	if (!fabric)
		return -FI_ENOMEM;
	fabric->direct = strcmp(attr->name, "efa-direct") == 0;
	fabric->api_version = attr->api_version;
	fabric->fid = (struct fid_fabric){
		.fid = { .fclass = FI_CLASS_FABRIC, .context = context, .ops = &fabric_fid_ops },
		.ops = &fabric_ops,
		.api_version = attr->api_version,
	};
	*out = &fabric->fid;
	return 0;
}

/* ---- addresses ---- */

static bool same(const struct face_address *a, const struct face_address *b)
{
	return memcmp(a->gid, b->gid, 16) == 0 && a->qpn == b->qpn && a->qkey == b->qkey;
}

static void entry_free(struct face_av *av, uint32_t at)
{
	(void)fi_av_remove(av->tcp, &av->entry[at].tcp, 1, 0);
	av->entry[at].used = av->entry[at].stale = false;
}

/* As EFA's: an address that is there already is the same one, and nobody counts how many have it. */
static int insert_one(struct face_av *av, const struct face_address *address, fi_addr_t *out)
{
	static const uint8_t none[16];
	struct sockaddr_in tcp = { .sin_family = AF_INET, .sin_port = htons(address->qpn) };
	uint32_t at = FACE_TABLE;

	if (memcmp(address->gid, none, sizeof(none)) == 0)
		return 0;
	for (uint32_t i = 0; i < FACE_TABLE; i++) {
		if (av->entry[i].used && !av->entry[i].stale && same(&av->entry[i].address, address)) {
			*out = i;
			return 1;
		}
		if (at == FACE_TABLE && !av->entry[i].used)
			at = i;
	}
	if (at == FACE_TABLE)
		return 0;
	memcpy(&tcp.sin_addr, address->gid + 12, 4);
	if (fi_av_insert(av->tcp, &tcp, 1, &av->entry[at].tcp, 0, NULL) != 1)
		return 0;
	av->entry[at].address = *address;
	av->entry[at].used = true;
	*out = at;
	return 1;
}

static int av_insert(struct fid_av *fid, const void *addresses, size_t count, fi_addr_t *out, uint64_t flags,
                     void *context)
{
	const uint8_t *at = addresses;
	int inserted = 0;

	(void)context;
	if (flags & ~FI_MORE)
		return -FI_ENOSYS;
	face_lock();
	for (size_t i = 0; i < count; i++, at += sizeof(struct face_address)) {
		struct face_address address;

		memcpy(&address, at, sizeof(address));
		out[i] = FI_ADDR_NOTAVAIL;
		inserted += insert_one(CONTAINER(fid, struct face_av), &address, &out[i]);
	}
	face_unlock();
	return inserted;
}

static int av_remove(struct fid_av *fid, fi_addr_t *address, size_t count, uint64_t flags)
{
	struct face_av *av = CONTAINER(fid, struct face_av);
	int rc = 0;

	(void)flags;
	face_lock();
	for (size_t i = 0; i < count; i++) {
		if (address[i] >= FACE_TABLE || !av->entry[address[i]].used || av->entry[address[i]].stale) {
			rc = -FI_EINVAL;
			break;
		}
		av->entry[address[i]].stale = true;
		if (!av->entry[address[i]].ops)
			entry_free(av, (uint32_t)address[i]);
	}
	face_unlock();
	return rc;
}

/* An op to it has ended. */
void face_av_done(struct face_av *av, fi_addr_t address)
{
	if (--av->entry[address].ops == 0 && av->entry[address].stale)
		entry_free(av, (uint32_t)address);
}

static int av_close(struct fid *fid)
{
	struct face_av *av = CONTAINER(fid, struct face_av);
	int rc = fi_close(&av->tcp->fid);

	free(av);
	return rc;
}

static struct fi_ops av_fid_ops = {
	.size = sizeof(struct fi_ops),
	.close = av_close,
	.bind = face_no_bind,
	.control = face_no_control,
	.ops_open = no_ops,
};

static struct fi_ops_av av_ops = {
	.size = sizeof(struct fi_ops_av),
	.insert = av_insert,
	.remove = av_remove,
};

int face_av_open(struct fid_domain *domain, struct fi_av_attr *attr, struct fid_av **out, void *context)
{
	struct face_av *av = calloc(1, sizeof(*av));
	int rc;

	if (!av)
		return -FI_ENOMEM;
	av->domain = CONTAINER(domain, struct face_domain);
	rc = fi_av_open(av->domain->tcp, attr, &av->tcp, NULL);
	if (rc) {
		free(av);
		return rc;
	}
	av->fid = (struct fid_av){
		.fid = { .fclass = FI_CLASS_AV, .context = context, .ops = &av_fid_ops },
		.ops = &av_ops,
	};
	*out = &av->fid;
	return 0;
}
