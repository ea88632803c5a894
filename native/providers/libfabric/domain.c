/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Opening a rail with libfabric: choosing the provider, getinfo, fabric, domain, address vector, completion queue.
 */
#include "domain.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../core/parts.h"
#include "efa.h"

#define API_VERSION FI_VERSION(1, 17)
#define NATIVE_RDM_TCP FI_VERSION(1, 19) /* before it, `tcp` has no RDM endpoint that can sleep */

int tfd_fi_fail(const struct tfd_domain *domain, struct tfd_error *error, const char *what, int rc)
{
	return tfd_fail(error, rc, "libfabric: %s failed: %s", what, domain->library->strerror(-rc));
}

/* The numeric IPv4 address of an interface, or of `name` itself. */
static bool interface_address(const char *name, char *out, size_t bytes)
{
	struct in_addr parsed;
	struct ifaddrs *all;
	bool found = false;

	if (inet_pton(AF_INET, name, &parsed) == 1) {
		(void)snprintf(out, bytes, "%s", name);
		return true;
	}
	if (getifaddrs(&all) != 0)
		return false;
	for (struct ifaddrs *i = all; i && !found; i = i->ifa_next) {
		if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET || strcmp(i->ifa_name, name) != 0)
			continue;
		found = inet_ntop(AF_INET, &((struct sockaddr_in *)(void *)i->ifa_addr)->sin_addr, out,
		                  (socklen_t)bytes) != NULL;
	}
	freeifaddrs(all);
	return found;
}

static const char *choose_fabric(const struct tfd_domain *domain, const struct tfd_group_options *options,
                                 bool is_interface)
{
	if (strcmp(options->fabric, "verbs") == 0) /* by itself it knows connections only */
		return "verbs;ofi_rxm";
	if (options->fabric[0])
		return options->fabric;
	if (!is_interface)
		return "efa";
	return FI_VERSION_GE(domain->library->version(), NATIVE_RDM_TCP) ? "tcp" : "tcp;ofi_rxm";
}

struct fi_info *tfd_fi_hints(const struct tfd_domain *domain, const char *provider)
{
	struct fi_info *hints = domain->library->dupinfo(NULL);

	if (!hints)
		return NULL;
	hints->caps = FI_RMA | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE;
	hints->mode = FI_CONTEXT | FI_CONTEXT2;
	hints->ep_attr->type = FI_EP_RDM;
	hints->domain_attr->threading = FI_THREAD_SAFE;
	hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
	hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
	hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
	hints->fabric_attr->prov_name = strdup(provider);
	return hints;
}

static int find_info(struct tfd_domain *domain, const struct tfd_group_options *options, const char *name,
                     struct tfd_error *error)
{
	char address[INET_ADDRSTRLEN];
	bool is_interface = interface_address(name, address, sizeof(address));
	const char *fabric = choose_fabric(domain, options, is_interface);
	struct fi_info *hints;
	int rc;

	if (tfd_fi_efa_named(fabric))
		return tfd_fi_efa_find(domain, fabric, name, error);
	hints = tfd_fi_hints(domain, fabric);
	if (!hints)
		return tfd_fail(error, -ENOMEM, "no memory for libfabric's hints");
	hints->addr_format = FI_SOCKADDR_IN; /* of an RDMA device: its network card's */
	hints->tx_attr->msg_order = hints->rx_attr->msg_order = FI_ORDER_WAW;
	if (is_interface) {
		rc = domain->library->getinfo(API_VERSION, address, "0", FI_SOURCE, hints, &domain->info);
	} else {
		hints->domain_attr->name = strdup(name);
		rc = domain->library->getinfo(API_VERSION, NULL, NULL, 0, hints, &domain->info);
	}
	domain->library->freeinfo(hints);
	if (rc == -FI_ENODATA)
		return tfd_fail(error, -ENODEV,
		                "rail \"%s\": no such interface or device for libfabric provider %s (`ip -br "
		                "addr` and "
		                "`fi_info -l` list them)",
		                name, fabric);
	return rc ? tfd_fi_fail(domain, error, "fi_getinfo", rc) : 0;
}

/* Not with rxm 1.17, which must have a queue for each half, whatever its immediates hold. */
static bool has_links(const struct tfd_domain *domain)
{
	return FI_VERSION_GE(domain->library->version(), NATIVE_RDM_TCP) &&
	       domain->info->domain_attr->cq_data_size >= sizeof(uint64_t);
}

/* One queue for all, where it can be told by which half an immediate came or where nobody asks; else one for each half. */
static int open_queue(struct tfd_domain *domain, struct tfd_error *error)
{
	int rc;

	if (!domain->efa && !has_links(domain)) {
		domain->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
		return domain->epoll_fd >= 0 ?
		               0 :
		               tfd_fail(error, -errno, "no file descriptor is left: %s", strerror(errno));
	}
	if (!domain->efa) {
		domain->links = calloc(TFD_FI_LINKS, sizeof(struct tfd_half *));
		if (!domain->links)
			return tfd_fail(error, -ENOMEM, "no memory for a rail");
		/* So that an immediate that was meant for an earlier life of this daemon finds nobody. */
		if (getrandom(&domain->last_link, sizeof(domain->last_link), 0) !=
		    (ssize_t)sizeof(domain->last_link))
			return tfd_fail(error, -EIO, "getrandom gave no number");
	}
	rc = tfd_fi_queue_open(domain, &domain->cq);
	return rc ? tfd_fi_fail(domain, error, "fi_cq_open", rc) : 0;
}

static int nothing_open(struct tfd_domain *domain, struct tfd_error *error)
{
	struct tfd_region_key key;

	return tfd_fi_mr_open(domain, domain->nothing_bytes, sizeof(domain->nothing_bytes), 0,
	                      &domain->nothing, &key, error);
}

static int open_objects(struct tfd_domain *domain, struct tfd_error *error)
{
	struct fi_av_attr av = { .type = FI_AV_TABLE };
	int rc = domain->library->fabric(domain->info->fabric_attr, &domain->fabric, NULL);

	if (rc)
		return tfd_fi_fail(domain, error, "fi_fabric", rc);
	rc = fi_domain(domain->fabric, domain->info, &domain->domain, NULL);
	if (rc)
		return tfd_fi_fail(domain, error, "fi_domain", rc);
	rc = fi_av_open(domain->domain, &av, &domain->av, NULL);
	if (rc)
		return tfd_fi_fail(domain, error, "fi_av_open", rc);
	if (tfd_fi_is_efa(domain->info))
		rc = tfd_fi_efa_open(domain, error);
	else if (domain->info->domain_attr->mr_mode & FI_MR_LOCAL)
		rc = nothing_open(domain, error);
	return rc ? rc : open_queue(domain, error);
}

static int describe(struct tfd_domain *domain, const char *name, struct tfd_rail_info *info,
                    struct tfd_error *error)
{
	const struct fi_info *fi = domain->info;
	uint32_t version = domain->library->version();

	if (fi->domain_attr->cq_data_size < sizeof(uint32_t))
		return tfd_fail(error, -ENOTSUP,
		                "libfabric provider %s carries %zu bytes of immediate; 4 are needed",
		                fi->fabric_attr->prov_name, fi->domain_attr->cq_data_size);
	(void)snprintf(info->name, sizeof(info->name), "%s", name);
	(void)snprintf(info->provider, sizeof(info->provider), "libfabric %s %u.%u",
	               fi->fabric_attr->prov_name, FI_MAJOR(version), FI_MINOR(version));
	/* Addresses of different wire protocols look alike: the name says which is spoken. */
	(void)snprintf(domain->protocol, sizeof(domain->protocol), "libfabric/%s/%u.%u",
	               fi->fabric_attr->prov_name, fi->ep_attr->protocol, fi->ep_attr->protocol_version);
	memcpy(info->protocol, domain->protocol, sizeof(info->protocol));
	info->max_message_bytes = fi->ep_attr->max_msg_size;
	info->imm_depth = tfd_fi_queue_grows(domain) ? 0 : TFD_FI_CQ_IMMS;
	info->ordered = (fi->tx_attr->msg_order & FI_ORDER_WAW) != 0;
	return domain->efa ? tfd_fi_efa_describe(domain, info, error) : 0;
}

int tfd_fi_domain_open(const struct tfd_group_options *options, const char *name, struct tfd_rail_info *info,
                       struct tfd_domain **out, struct tfd_error *error)
{
	struct tfd_domain *domain = calloc(1, sizeof(*domain));
	int rc;

	if (!domain)
		return tfd_fail(error, -ENOMEM, "no memory for a rail");
	domain->epoll_fd = -1;
	rc = tfd_fi_load(options->library, &domain->library, error);
	if (!rc)
		rc = find_info(domain, options, name, error);
	if (!rc)
		rc = open_objects(domain, error);
	if (!rc)
		rc = describe(domain, name, info, error);
	if (rc) {
		tfd_fi_domain_close(domain);
		return rc;
	}
	*out = domain;
	return 0;
}

static void close_fid(struct fid *fid)
{
	if (fid)
		(void)fi_close(fid);
}

void tfd_fi_domain_close(struct tfd_domain *domain)
{
	if (!domain)
		return;
	while (domain->halves)
		tfd_fi_half_free(domain->halves);
	if (domain->nothing)
		tfd_fi_mr_close(domain, domain->nothing);
	close_fid(domain->cq ? &domain->cq->fid : NULL);
	if (domain->epoll_fd >= 0)
		(void)close(domain->epoll_fd);
	close_fid(domain->av ? &domain->av->fid : NULL);
	close_fid(domain->domain ? &domain->domain->fid : NULL);
	close_fid(domain->fabric ? &domain->fabric->fid : NULL);
	if (domain->info)
		domain->library->freeinfo(domain->info);
	tfd_fi_efa_close(domain->efa);
	free(domain->links);
	free(domain);
}
