/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Native tcp, before an endpoint is closed. A connection to it that has been accepted and has not yet said whose it is outlives it, and
 * when it speaks or ends the library reads the endpoint's freed memory (xnet_pep_close, up to 2.6). The library has no call that ends
 * those. But their sockets bear the endpoint's address, and one that is at its end is let go of: so they are shut, for receiving.
 */
#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "domain.h"

/* One ends what is silent, two who has just said who it is; the others are for a queue with much to do. */
#define ROUNDS 8

static bool is_listener(int fd)
{
	int listens = 0;
	socklen_t bytes = sizeof(listens);

	return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &bytes) == 0 && listens;
}

static bool has_address(int fd, const struct sockaddr_storage *address, size_t address_bytes)
{
	struct sockaddr_storage own;
	socklen_t bytes = sizeof(own);

	return getsockname(fd, (struct sockaddr *)&own, &bytes) == 0 && bytes == address_bytes &&
	       memcmp(&own, address, bytes) == 0;
}

/* Whether there were connections. No other thread closes sockets of that address: a number stays what it is. */
static bool shut_sockets(const struct sockaddr_storage *address, size_t address_bytes)
{
	DIR *fds = opendir("/proc/self/fd");
	const struct dirent *entry;
	bool any = false;

	if (!fds)
		return false;
	while ((entry = readdir(fds))) {
		/* Of "." and "..", 0: whatever that is, it does not have the address. */
		int fd = (int)strtol(entry->d_name, NULL, 10);

		if (!has_address(fd, address, address_bytes))
			continue;
		if (!is_listener(fd))
			any = true;
		(void)shutdown(fd, SHUT_RD); /* of a listener: it listens no more */
	}
	(void)closedir(fds);
	return any;
}

void tfd_fi_hang_up(const struct tfd_half *half)
{
	struct sockaddr_storage address;
	size_t bytes = sizeof(address);

	if (fi_getname(&half->ep->fid, &address, &bytes) != 0 || bytes > sizeof(address))
		return;
	for (int round = 0; round < ROUNDS && shut_sockets(&address, bytes); round++)
		(void)fi_cq_read(half->domain->cq, NULL, 0); /* progress alone */
}
