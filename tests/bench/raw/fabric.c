/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The libfabric calls of native/providers/libfabric: hints, flags, environment, an endpoint with a completion queue of
 * its own per direction, and memory (memfd) are the same. Errors end the process.
 */
#include "fabric.h"

#include <dlfcn.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CQ_ENTRIES 1024
#define POLL_ENTRIES 64

#define CHECK(call) check((long)(call), #call)

static struct {
	int (*getinfo)(uint32_t version, const char *node, const char *service, uint64_t flags,
	               const struct fi_info *hints, struct fi_info **info);
	struct fi_info *(*dupinfo)(const struct fi_info *info);
	int (*fabric)(struct fi_fabric_attr *attributes, struct fid_fabric **fabric, void *context);
	uint32_t (*version)(void);
	const char *(*strerror)(int error);
} library;

static const char *library_path;
static const char *fabric_name;

static void check(long rc, const char *what)
{
	if (rc == 0)
		return;
	(void)fprintf(stderr, "fi_raw: %s: %s\n", what,
	              library.strerror ? library.strerror((int)-rc) : "failed");
	exit(1);
}

uint64_t now_ns(void)
{
	struct timespec t;

	(void)clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- the two processes ---- */

void tell(int socket, const void *data, size_t bytes)
{
	if (write(socket, data, bytes) != (ssize_t)bytes)
		exit(1);
}

void hear(int socket, void *data, size_t bytes)
{
	if (recv(socket, data, bytes, MSG_WAITALL) != (ssize_t)bytes)
		exit(1);
}

bool heard(int socket)
{
	char byte;
	ssize_t got = recv(socket, &byte, 1, MSG_DONTWAIT);

	if (got == 0)
		exit(1); /* the other process died */
	return got == 1;
}

/* ---- opening: native/providers/libfabric/loader.c, domain.c and half.c, without their care ---- */

static void *symbol(void *handle, const char *name)
{
	void *found = dlsym(handle, name);

	if (found)
		return found;
	(void)fprintf(stderr, "fi_raw: %s has no %s\n", library_path, name);
	exit(1);
}

void library_load(const char *path, const char *fabric)
{
	void *handle;

	(void)setenv("FI_OFI_RXM_ENABLE_PASSTHRU", "1", 0);
	(void)setenv("FI_PROVIDER", "efa,verbs,tcp,ofi_rxm", 0);
	library_path = path ? path : "libfabric.so.1";
	handle = dlopen(library_path, RTLD_NOW | RTLD_LOCAL);
	if (!handle) {
		(void)fprintf(stderr, "fi_raw: %s\n", dlerror());
		exit(1);
	}
	*(void **)&library.getinfo = symbol(handle, "fi_getinfo");
	*(void **)&library.dupinfo = symbol(handle, "fi_dupinfo");
	*(void **)&library.fabric = symbol(handle, "fi_fabric");
	*(void **)&library.version = symbol(handle, "fi_version");
	*(void **)&library.strerror = symbol(handle, "fi_strerror");
	fabric_name = fabric;
	if (!fabric) /* `tcp` has RDM endpoints of its own from 1.19 on */
		fabric_name = FI_VERSION_GE(library.version(), FI_VERSION(1, 19)) ? "tcp" : "tcp;ofi_rxm";
}

static struct fi_info *hints_make(void)
{
	struct fi_info *hints = library.dupinfo(NULL);

	hints->caps = FI_RMA | FI_WRITE | FI_REMOTE_WRITE;
	hints->mode = FI_CONTEXT | FI_CONTEXT2;
	hints->ep_attr->type = FI_EP_RDM;
	hints->domain_attr->threading = FI_THREAD_SAFE;
	hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
	hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
	hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
	hints->fabric_attr->prov_name = strdup(fabric_name);
	hints->addr_format = FI_SOCKADDR_IN;
	hints->tx_attr->msg_order = hints->rx_attr->msg_order = FI_ORDER_WAW;
	return hints;
}

static void memory_open(struct side *side, size_t bytes)
{
	int fd = memfd_create("fi_raw", MFD_CLOEXEC);

	if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0)
		check(-FI_ENOMEM, "memfd");
	side->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (side->memory == MAP_FAILED)
		check(-FI_ENOMEM, "mmap");
	memset(side->memory, 0x5a, bytes);
	CHECK(fi_mr_reg(side->domain, side->memory, bytes, FI_WRITE | FI_REMOTE_WRITE, 0, (uint64_t)getpid(),
	                0, &side->mr, NULL));
}

void side_open(struct side *side, int socket, size_t bytes)
{
	struct fi_av_attr av = { .type = FI_AV_TABLE };

	side->socket = socket;
	CHECK(library.getinfo(FI_VERSION(1, 17), "127.0.0.1", "0", FI_SOURCE, hints_make(), &side->info));
	CHECK(library.fabric(side->info->fabric_attr, &side->fabric, NULL));
	CHECK(fi_domain(side->fabric, side->info, &side->domain, NULL));
	CHECK(fi_av_open(side->domain, &av, &side->av, NULL));
	memory_open(side, bytes);
}

struct half *half_open(struct side *side)
{
	struct fi_cq_attr queue = { .size = CQ_ENTRIES, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_FD };
	struct half *half = calloc(1, sizeof(*half));
	struct address here = { .key = fi_mr_key(side->mr) };
	size_t name_bytes = sizeof(here.name);

	if (!half)
		exit(1);
	half->side = side;
	CHECK(fi_cq_open(side->domain, &queue, &half->cq, NULL));
	CHECK(fi_endpoint(side->domain, side->info, &half->ep, NULL));
	CHECK(fi_ep_bind(half->ep, &side->av->fid, 0));
	CHECK(fi_ep_bind(half->ep, &half->cq->fid, FI_TRANSMIT | FI_RECV));
	CHECK(fi_enable(half->ep));
	CHECK(fi_getname(&half->ep->fid, here.name, &name_bytes));
	if (side->info->domain_attr->mr_mode & FI_MR_VIRT_ADDR)
		here.memory = (uint64_t)(uintptr_t)side->memory;
	tell(side->socket, &here, sizeof(here));
	hear(side->socket, &half->there, sizeof(half->there));
	if (fi_av_insert(side->av, half->there.name, 1, &half->far, 0, NULL) != 1)
		check(-FI_EINVAL, "fi_av_insert");
	for (; half->unused_count < PIECES_MAX; half->unused_count++)
		half->unused[half->unused_count] = &half->contexts[half->unused_count];
	return half;
}

/* ---- posting and polling: native/providers/libfabric/libfabric.c ---- */

bool post(struct half *half, uint64_t offset, size_t length, bool imm)
{
	uint64_t flags = FI_COMPLETION | FI_DELIVERY_COMPLETE | (imm ? FI_REMOTE_CQ_DATA : 0);
	struct iovec local = { .iov_base = half->side->memory + offset, .iov_len = length };
	struct fi_rma_iov remote = { .addr = half->there.memory + offset,
	                             .len = length,
	                             .key = half->there.key };
	void *descriptor = fi_mr_desc(half->side->mr);
	struct fi_msg_rma message = { .msg_iov = &local,
	                              .desc = &descriptor,
	                              .iov_count = 1,
	                              .addr = half->far,
	                              .rma_iov = &remote,
	                              .rma_iov_count = 1,
	                              .context = half->unused[half->unused_count - 1],
	                              .data = 7 };
	ssize_t rc = fi_writemsg(half->ep, &message, flags);

	if (rc == -FI_EAGAIN)
		return false;
	CHECK(rc);
	half->unused_count--;
	return true;
}

uint32_t poll_half(struct half *half)
{
	struct fi_cq_data_entry entries[POLL_ENTRIES];
	struct fi_cq_err_entry error = { 0 };
	ssize_t count = fi_cq_read(half->cq, entries, POLL_ENTRIES);

	if (count == -FI_EAVAIL) {
		(void)fi_cq_readerr(half->cq, &error, 0);
		check(-error.err, "completion");
	}
	for (ssize_t i = 0; i < count; i++) {
		if (entries[i].flags & FI_REMOTE_WRITE) {
			half->arrived++;
		} else {
			half->sent++;
			half->unused[half->unused_count++] = entries[i].op_context;
		}
	}
	return count > 0 ? (uint32_t)count : 0;
}

void version_print(const struct side *side)
{
	(void)printf("\"fabric\": \"%s\", \"version\": \"%u.%u\"}\n", side->info->fabric_attr->prov_name,
	             FI_MAJOR(library.version()), FI_MINOR(library.version()));
}
