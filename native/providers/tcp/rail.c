/* SPDX-License-Identifier: Apache-2.0 */
/* Opening a rail: its address, the socket that far halves connect to, the epoll that the worker sleeps on. */
#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "../../core/parts.h"
#include "tcp.h"

#define BACKLOG 4096 /* the kernel takes net.core.somaxconn if that is less */

static bool parse_address(const char *name, struct sockaddr_storage *out)
{
	struct sockaddr_in *four = (void *)out;
	struct sockaddr_in6 *six = (void *)out;

	memset(out, 0, sizeof(*out));
	if (inet_pton(AF_INET, name, &four->sin_addr) == 1) {
		out->ss_family = AF_INET;
		return true;
	}
	if (inet_pton(AF_INET6, name, &six->sin6_addr) != 1)
		return false;
	out->ss_family = AF_INET6;
	return true;
}

static socklen_t bytes_of(const struct sockaddr *address)
{
	return address->sa_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
}

/* Which of an interface's addresses is taken: IPv4, then IPv6, then IPv6 of this link only. 0: not an address of ours. */
static int rank_of(const struct sockaddr *address)
{
	if (!address)
		return 0;
	if (address->sa_family == AF_INET)
		return 3;
	if (address->sa_family != AF_INET6)
		return 0;
	return IN6_IS_ADDR_LINKLOCAL(&((const struct sockaddr_in6 *)(const void *)address)->sin6_addr) ? 1 :
	                                                                                                 2;
}

static bool interface_address(const char *name, struct sockaddr_storage *out)
{
	struct ifaddrs *all;
	int best = 0;

	if (getifaddrs(&all) != 0)
		return false;
	for (const struct ifaddrs *i = all; i; i = i->ifa_next) {
		int rank = strcmp(i->ifa_name, name) == 0 ? rank_of(i->ifa_addr) : 0;

		if (rank <= best)
			continue;
		best = rank;
		memset(out, 0, sizeof(*out));
		memcpy(out, i->ifa_addr, bytes_of(i->ifa_addr));
	}
	freeifaddrs(all);
	return best != 0;
}

static int no_rail(struct tfd_error *error, const char *name)
{
	return tfd_fail(error, -ENODEV,
	                "rail \"%s\": no such interface or address on this host (`ip -br addr` lists them)",
	                name);
}

static bool is_wildcard(const struct sockaddr_storage *address)
{
	const struct sockaddr_in *four = (const void *)address;
	const struct sockaddr_in6 *six = (const void *)address;

	return address->ss_family == AF_INET ? four->sin_addr.s_addr == htonl(INADDR_ANY) :
	                                       IN6_IS_ADDR_UNSPECIFIED(&six->sin6_addr);
}

static int listen_open(struct tfd_domain *domain, const char *name, struct tfd_error *error)
{
	struct sockaddr *address = (void *)&domain->address;
	int on = 1;

	domain->address_bytes = bytes_of(address);
	domain->listen_fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (domain->listen_fd < 0)
		return tfd_fail(error, -errno, "no socket for rail %s: %s", name, strerror(errno));
	if (address->sa_family == AF_INET6)
		(void)setsockopt(domain->listen_fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on));
	if (bind(domain->listen_fd, address, domain->address_bytes) != 0)
		return errno == EADDRNOTAVAIL ?
		               no_rail(error, name) :
		               tfd_fail(error, -errno, "rail %s: binding to its address failed: %s", name,
		                        strerror(errno));
	if (listen(domain->listen_fd, BACKLOG) != 0 ||
	    getsockname(domain->listen_fd, address, &domain->address_bytes) != 0)
		return tfd_fail(error, -errno, "rail %s: listening failed: %s", name, strerror(errno));
	return 0;
}

static int epoll_open(struct tfd_domain *domain, struct tfd_error *error)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = &domain->listener };

	domain->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (domain->epoll_fd < 0 ||
	    epoll_ctl(domain->epoll_fd, EPOLL_CTL_ADD, domain->listen_fd, &event) != 0)
		return tfd_fail(error, -errno, "no file descriptor is left: %s", strerror(errno));
	return 0;
}

int tfd_tcp_domain_open(const struct tfd_group_options *options, const char *name, struct tfd_rail_info *info,
                        struct tfd_domain **out, struct tfd_error *error)
{
	struct tfd_domain *domain = calloc(1, sizeof(*domain));
	int rc;

	(void)options;
	if (!domain)
		return tfd_fail(error, -ENOMEM, "no memory for a rail");
	tfd_memory_init(&domain->memory);
	tfd_list_init(&domain->halves);
	tfd_list_init(&domain->sending);
	tfd_list_init(&domain->ready);
	domain->listen_fd = domain->epoll_fd = -1;
	domain->listener.kind = TFD_TCP_LISTENER;
	for (uint32_t i = 0; i < TFD_TCP_STRANGERS; i++) {
		domain->strangers[i].watch.kind = TFD_TCP_STRANGER;
		domain->strangers[i].fd = -1;
	}
	rc = parse_address(name, &domain->address) || interface_address(name, &domain->address) ?
	             0 :
	             no_rail(error, name);
	if (!rc && is_wildcard(&domain->address)) /* the far side would connect to itself */
		rc = tfd_fail(error, -EINVAL, "rail \"%s\" means every address of this host: name one", name);
	if (!rc)
		rc = listen_open(domain, name, error);
	if (!rc)
		rc = epoll_open(domain, error);
	if (rc) {
		tfd_tcp_domain_close(domain);
		return rc;
	}
	(void)snprintf(info->name, sizeof(info->name), "%s", name);
	(void)snprintf(info->provider, sizeof(info->provider), "tcp");
	(void)snprintf(info->protocol, sizeof(info->protocol), "%s", TFD_TCP_PROTOCOL);
	info->max_message_bytes = TFD_TCP_TOTAL_MAX;
	info->ordered = 1;
	info->max_parts = TFD_TCP_PARTS_MAX;
	*out = domain;
	return 0;
}

void tfd_tcp_domain_close(struct tfd_domain *domain)
{
	if (!domain)
		return;
	while (!tfd_list_empty(&domain->halves)) {
		struct tfd_half *half = tfd_container(domain->halves.next, struct tfd_half, link);

		tfd_tcp_half_close(half);
		tfd_tcp_half_free(half);
	}
	for (uint32_t i = 0; i < TFD_TCP_STRANGERS; i++) {
		if (domain->strangers[i].fd >= 0)
			(void)close(domain->strangers[i].fd);
	}
	if (domain->listen_fd >= 0)
		(void)close(domain->listen_fd);
	if (domain->epoll_fd >= 0)
		(void)close(domain->epoll_fd);
	free(domain->numbers);
	tfd_memory_fini(&domain->memory);
	free(domain);
}
