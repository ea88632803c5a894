/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is EFA's alone: which of its two fabrics, what it calls its domains, whether it writes by the device (fi_efa(7)), and what
 * becomes of what is in flight when an endpoint is closed. Endpoints and queues are in the other files, as everybody's.
 */
#include "efa.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../core/parts.h"

#define MINIMUM FI_VERSION(1, 22) /* writes with immediate that are not emulated */
/* The API that is asked for. Before 1.18 some devices do not write by themselves, before 1.20 there are no dma-bufs. */
#define EFA_API FI_VERSION(1, 20)
#define DOMAIN_SUFFIX "-rdm" /* of a device's domain for reliable datagrams */
#define OPT_EMULATED_WRITE                                                                   \
	(-(0xefa << 16) + 2) /* FI_OPT_EFA_EMULATED_WRITE, which headers of 1.17 have not */
#define OPT_INJECT_RMA_SIZE 18 /* FI_OPT_INJECT_RMA_SIZE, of headers from 1.22 on */
#define REMOTE_BAD_ADDRESS                                                                    \
	7 /* prov_errno: key, range or rights at the far side, of which err says FI_EINVAL */

/* As many contexts as a worker has work requests; each of those is kept once at most, beside all immediates of a full queue. */
#define OPS TFD_WRS_PER_WORKER
#define KEPT (OPS + 2 * TFD_FI_CQ_IMMS)

struct op {
	struct fi_context2 context; /* first: what libfabric knows it by */
	struct tfd_wr *wr;
	struct tfd_half *half; /* NULL: free */
	struct op *next; /* of the free ones */
};

struct tfd_fi_efa {
	struct op *free; /* the one that was given back longest ago first */
	struct op *last; /* of the free ones, if there are any */
	struct op ops[OPS];
	uint32_t kept_first, kept_count;
	bool kept_lost; /* more came than there is room for */
	struct tfd_wc kept[KEPT]; /* ring */
};

bool tfd_fi_is_efa(const struct fi_info *info)
{
	return strcmp(info->fabric_attr->prov_name, "efa") == 0;
}

bool tfd_fi_efa_named(const char *fabric)
{
	return strcmp(fabric, "efa") == 0 || strcmp(fabric, "efa-direct") == 0;
}

static int find(struct tfd_domain *domain, const char *fabric, const char *device)
{
	struct fi_info *hints = tfd_fi_hints(domain, "efa");
	size_t bytes = strlen(device);
	char name[TFD_NAME_MAX + sizeof(DOMAIN_SUFFIX)];
	bool whole = bytes > strlen(DOMAIN_SUFFIX) &&
	             strcmp(device + bytes - strlen(DOMAIN_SUFFIX), DOMAIN_SUFFIX) == 0;
	int rc;

	if (!hints)
		return -FI_ENOMEM;
	(void)snprintf(name, sizeof(name), "%s%s", device, whole ? "" : DOMAIN_SUFFIX);
	hints->domain_attr->name = strdup(name);
	hints->fabric_attr->name = strdup(fabric);
	/* Not by shared memory with processes of this host, which would move our writes by its own rules. */
	hints->caps |= FI_REMOTE_COMM;
	rc = domain->library->getinfo(EFA_API, NULL, NULL, 0, hints, &domain->info);
	domain->library->freeinfo(hints);
	if (!rc && strcmp(domain->info->fabric_attr->name, fabric) !=
	                   0) { /* versions that know of one fabric do not compare */
		domain->library->freeinfo(domain->info);
		domain->info = NULL;
		rc = -FI_ENODATA;
	}
	return rc;
}

/* `device`: as sysfs calls it, or as libfabric calls its domain. */
int tfd_fi_efa_find(struct tfd_domain *domain, const char *fabric, const char *device,
                    struct tfd_error *error)
{
	uint32_t version = domain->library->version();
	int rc;

	if (FI_VERSION_LT(version, MINIMUM))
		return tfd_fail(error, -ENOTSUP,
		                "rail %s is no interface or address of this host, and for EFA devices "
		                "libfabric %u.%u is too old: install 1.22 or newer",
		                device, FI_MAJOR(version), FI_MINOR(version));
	rc = find(domain, "efa-direct", device); /* each post is one of the device's own */
	if (rc == -FI_ENODATA && strcmp(fabric, "efa") == 0)
		rc = find(domain, "efa", device);
	if (rc == -FI_ENODATA)
		return tfd_fail(
			error, -ENODEV,
			"rail \"%s\": libfabric %u.%u has no domain of an EFA device of that name with "
			"fabric %s (`fi_info -p efa` lists them)",
			device, FI_MAJOR(version), FI_MINOR(version), fabric);
	return rc ? tfd_fi_fail(domain, error, "fi_getinfo", rc) : 0;
}

/*
 * efa-direct moves bytes by the device alone, but for short writes: after 2.6 the processor copies those into the request, where it takes their
 * memory for its own, as it takes a dma-buf's.
 */
int tfd_fi_efa_leave_to_device(const struct tfd_half *half)
{
	size_t none = 0;

	return fi_setopt(&half->ep->fid, FI_OPT_ENDPOINT, OPT_INJECT_RMA_SIZE, &none, sizeof(none));
}

/*
 * Asks an endpoint, which also shows that the device has one to give. Fabric efa takes no dma-buf, though its library would: what it emulates,
 * for which the far side's device may be the reason, processors copy, and write to wherever a dma-buf says that it is.
 */
static int ask_endpoint(struct tfd_domain *domain, bool *emulated, struct tfd_error *error)
{
	size_t bytes = sizeof(*emulated);
	struct tfd_half *half;
	int rc = tfd_fi_half_make(domain, &half, error);

	if (rc)
		return rc;
	if (fi_getopt(&half->ep->fid, FI_OPT_ENDPOINT, OPT_EMULATED_WRITE, emulated, &bytes) != 0)
		*emulated = false;
	domain->takes_dmabuf = strcmp(domain->info->fabric_attr->name, "efa-direct") == 0 &&
	                       tfd_fi_efa_leave_to_device(half) == 0;
	tfd_fi_half_free(half);
	return 0;
}

int tfd_fi_efa_describe(struct tfd_domain *domain, struct tfd_rail_info *info, struct tfd_error *error)
{
	const char *fabric = domain->info->fabric_attr->name;
	bool emulated = false;
	int rc = ask_endpoint(domain, &emulated, error);

	if (rc)
		return rc;
	info->ordered = 0;
	info->emulated = emulated;
	(void)snprintf(info->why, sizeof(info->why), "fabric %s%s; %s%s%s", fabric,
	               strcmp(fabric, "efa") == 0 ?
	                       " (efa-direct is for libfabric 2.2 and devices with RDMA write)" :
	                       "",
	               emulated ?
	                       "WRITES ARE EMULATED: this device or libfabric's settings have no RDMA write" :
	                       "writes by the device",
	               domain->takes_dmabuf ? "; takes dma-bufs" : "",
	               domain->polled ? "; no wait fd: an idle worker polls every millisecond" : "");
	return 0;
}

bool tfd_fi_efa_refused(int prov_errno)
{
	return prov_errno == REMOTE_BAD_ADDRESS;
}

/* ---- what is in flight ---- */

int tfd_fi_efa_open(struct tfd_domain *domain, struct tfd_error *error)
{
	struct tfd_fi_efa *efa = calloc(1, sizeof(*efa));

	if (!efa)
		return tfd_fail(error, -ENOMEM, "no memory for a rail");
	for (struct op *op = efa->ops; op < efa->ops + OPS - 1; op++)
		op->next = op + 1;
	efa->free = efa->ops;
	efa->last = efa->ops + OPS - 1;
	domain->efa = efa;
	return 0;
}

void tfd_fi_efa_close(struct tfd_fi_efa *efa)
{
	free(efa);
}

void *tfd_fi_efa_op(struct tfd_half *half, struct tfd_wr *wr)
{
	struct tfd_fi_efa *efa = half->domain->efa;
	struct op *op = efa->free;

	if (!op)
		return NULL;
	efa->free = op->next;
	op->wr = wr;
	op->half = half;
	return &op->context;
}

struct tfd_wr *tfd_fi_efa_op_done(struct tfd_fi_efa *efa, void *context)
{
	struct op *op = context;

	if (!op->half)
		return NULL;
	op->half = NULL;
	op->next = NULL;
	if (efa->free)
		efa->last->next = op;
	else
		efa->free = op;
	efa->last = op;
	return op->wr;
}

static void keep(struct tfd_fi_efa *efa, const struct tfd_wc *wc)
{
	if (efa->kept_count == KEPT) {
		efa->kept_lost = true;
		return;
	}
	efa->kept[(efa->kept_first + efa->kept_count++) % KEPT] = *wc;
}

/* At most what a queue holds: the far sides may go on filling it. */
void tfd_fi_efa_keep(struct tfd_domain *domain)
{
	struct tfd_wc wc;

	for (uint32_t i = 0; i < OPS + TFD_FI_CQ_IMMS && tfd_fi_queue_poll(domain, NULL, &wc, 1); i++)
		keep(domain->efa, &wc);
}

void tfd_fi_efa_flush(struct tfd_half *half)
{
	struct tfd_fi_efa *efa = half->domain->efa;
	struct tfd_wc flushed = { .type = TFD_WC_ERROR, .error = ECANCELED };

	for (struct op *op = efa->ops; op < efa->ops + OPS; op++) {
		if (op->half != half)
			continue;
		flushed.wr = tfd_fi_efa_op_done(efa, op);
		keep(efa, &flushed);
	}
}

bool tfd_fi_efa_kept(const struct tfd_fi_efa *efa)
{
	return efa->kept_count != 0;
}

int tfd_fi_efa_poll(struct tfd_domain *domain, struct tfd_wc *wc, int max)
{
	struct tfd_fi_efa *efa = domain->efa;
	int count = 0;

	if (efa->kept_lost) {
		efa->kept_lost = false;
		wc[count++] = (struct tfd_wc){ .type = TFD_WC_ERROR, .error = EOVERFLOW };
	}
	while (efa->kept_count && count < max) {
		wc[count++] = efa->kept[efa->kept_first];
		efa->kept_first = (efa->kept_first + 1) % KEPT;
		efa->kept_count--;
	}
	return count ? count : tfd_fi_queue_poll(domain, NULL, wc, max);
}
