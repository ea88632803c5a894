/* SPDX-License-Identifier: Apache-2.0 */
/* Protection domains and registered memory. A key is a slot and which life of it: an old key finds nothing. */
#include "soft.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define KNOWN_ACCESS                                                                                        \
	(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_ON_DEMAND | \
	 IBV_ACCESS_OPTIONAL_RANGE)

SOFT_EXPORT struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
	struct soft_context *soft = soft_context_of(context);
	struct soft_pd *pd;

	if (soft_fails(soft, "ibv_alloc_pd"))
		return NULL;
	pd = calloc(1, sizeof(*pd));
	if (!pd)
		return NULL;
	pd->pd.context = context;
	soft_lock();
	soft->objects++;
	soft->device->counts.pds++;
	soft_unlock();
	return &pd->pd;
}

SOFT_EXPORT int ibv_dealloc_pd(struct ibv_pd *pd)
{
	struct soft_pd *soft = (struct soft_pd *)pd;
	struct soft_context *context = soft_context_of(pd->context);

	if (soft_fails(NULL, "ibv_dealloc_pd"))
		return errno;
	soft_lock();
	if (soft->users) {
		soft_unlock();
		return soft_refuse(EBUSY, "ibv_dealloc_pd: %u memory regions, queues and queue pairs use it",
		                   soft->users);
	}
	context->objects--;
	context->device->counts.pds--;
	soft_unlock();
	free(soft);
	return 0;
}

/* Whether there is memory that allows it: as much of it as tells, its first and its last page. */
static int pin(const void *address, size_t length, uint32_t access)
{
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	uintptr_t first = (uintptr_t)address & ~(page - 1);
	uintptr_t last = ((uintptr_t)address + length - 1) & ~(page - 1);
	int how = access & IBV_ACCESS_LOCAL_WRITE ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;

	return madvise((void *)first, page, how) || madvise((void *)last, page, how) ? EFAULT : 0;
}

static int mr_check(const struct ibv_pd *pd, size_t length, uint64_t iova, const void *address,
                    uint32_t access)
{
	if (access & ~(uint32_t)KNOWN_ACCESS)
		return soft_refuse(EINVAL, "registering: access %#x is not known", access);
	if (access & IBV_ACCESS_REMOTE_WRITE && !(access & IBV_ACCESS_LOCAL_WRITE))
		return soft_refuse(EINVAL, "registering: remote write without local write");
	if (access & IBV_ACCESS_ON_DEMAND)
		return soft_refuse(EOPNOTSUPP, "registering: the device cannot page on demand");
	if (!length || iova + length < iova)
		return soft_refuse(EINVAL, "registering: %zu bytes at %#llx", length,
		                   (unsigned long long)iova);
	if (((uintptr_t)address ^ iova) & 4095)
		return soft_refuse(EINVAL, "registering: iova and address differ within a page");
	return pd->context ? 0 : EINVAL;
}

/* fabric.lock. Gives it a key; errno. */
static int mr_add(struct soft_mr *mr)
{
	if (fabric.config.memlock && fabric.registered + mr->mr.length > fabric.config.memlock)
		return soft_refuse(ENOMEM, "registering %zu bytes: RLIMIT_MEMLOCK leaves %llu", mr->mr.length,
		                   (unsigned long long)(fabric.config.memlock - fabric.registered));
	for (uint32_t i = 0; i < SOFT_MRS; i++) {
		uint32_t slot = fabric.mr_hand++ % SOFT_MRS;

		if (fabric.mrs[slot] || !slot)
			continue;
		fabric.mrs[slot] = mr;
		mr->mr.lkey = slot << 8 | ++fabric.mr_lives[slot];
		mr->mr.rkey = mr->mr.lkey;
		fabric.registered += mr->mr.length;
		((struct soft_pd *)mr->mr.pd)->users++;
		soft_context_of(mr->mr.context)->objects++;
		mr->device->counts.mrs++;
		if (mr->access & IBV_ACCESS_RELAXED_ORDERING)
			mr->device->counts.relaxed_mrs++;
		if (mr->mapping)
			mr->device->counts.dmabuf_mrs++;
		return 0;
	}
	return soft_refuse(ENOMEM, "registering: no key is free");
}

/* Takes `mapping` over if it succeeds. */
static struct ibv_mr *mr_open(struct ibv_pd *pd, void *memory, size_t length, uint64_t iova, uint32_t access,
                              void *mapping, size_t mapping_bytes)
{
	struct soft_mr *mr;
	int failed;

	errno = mr_check(pd, length, iova, memory, access);
	if (errno)
		return NULL;
	errno = pin(memory, length, access);
	if (errno) {
		(void)soft_refuse(errno, "registering %zu bytes at %p: not memory that allows access %#x",
		                  length, memory, access);
		return NULL;
	}
	mr = calloc(1, sizeof(*mr));
	if (!mr)
		return NULL;
	*mr = (struct soft_mr){
		.mr = { .context = pd->context, .pd = pd, .addr = memory, .length = length },
		.device = soft_context_of(pd->context)->device,
		.iova = iova,
		.memory = memory,
		.mapping = mapping,
		.mapping_bytes = mapping_bytes,
		.access = access,
	};
	soft_lock();
	failed = mr_add(mr);
	soft_unlock();
	if (!failed)
		return &mr->mr;
	free(mr);
	errno = failed;
	return NULL;
}

#undef ibv_reg_mr
SOFT_EXPORT struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *address, size_t length, int access)
{
	if (soft_fails(soft_context_of(pd->context), "ibv_reg_mr"))
		return NULL;
	if ((uint32_t)access & IBV_ACCESS_OPTIONAL_RANGE) {
		(void)soft_refuse(EINVAL, "ibv_reg_mr: optional access %#x goes by ibv_reg_mr_iova2", access);
		return NULL;
	}
	return mr_open(pd, address, length, (uintptr_t)address, (uint32_t)access, NULL, 0);
}

SOFT_EXPORT struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *address, size_t length, uint64_t iova,
                                            unsigned int access)
{
	if (soft_fails(soft_context_of(pd->context), "ibv_reg_mr_iova2"))
		return NULL;
	return mr_open(pd, address, length, iova, access, NULL, 0);
}

SOFT_EXPORT struct ibv_mr *ibv_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t length, uint64_t iova,
                                             int fd, int access)
{
	int protection = PROT_READ | (access & IBV_ACCESS_LOCAL_WRITE ? PROT_WRITE : 0);
	uint64_t first = offset & ~4095ull;
	size_t bytes = (size_t)(offset - first) + length;
	struct ibv_mr *mr;
	uint8_t *mapping;

	if (soft_fails(soft_context_of(pd->context), "ibv_reg_dmabuf_mr"))
		return NULL;
	if (!fabric.config.dmabuf) {
		(void)soft_refuse(EOPNOTSUPP, "ibv_reg_dmabuf_mr: the device does not do that");
		return NULL;
	}
	mapping = mmap(NULL, bytes, protection, MAP_SHARED, fd, (off_t)first);
	if (mapping == MAP_FAILED)
		return NULL;
	mr = mr_open(pd, mapping + (offset - first), length, iova, (uint32_t)access, mapping, bytes);
	if (!mr) {
		int error = errno;

		(void)munmap(mapping, bytes);
		errno = error;
	}
	return mr;
}

/* Whether a work request that is not polled as done names it. fabric.lock. */
static int mr_is_named(const struct soft_mr *mr)
{
	int named = 0;

	for (uint32_t i = 0; i < SOFT_QPS && !named; i++) {
		struct soft_qp *qp = fabric.qps[i];

		if (!qp)
			continue;
		(void)pthread_mutex_lock(&qp->lock);
		for (uint32_t at = qp->freed; at != qp->tail && !named; at++) {
			const struct soft_wqe *wqe = &qp->ring[at % qp->cap.max_send_wr];

			for (uint32_t s = 0; s < wqe->sge_count && !wqe->inline_bytes; s++)
				named |= wqe->sges[s].length && wqe->sges[s].lkey == mr->mr.lkey;
		}
		(void)pthread_mutex_unlock(&qp->lock);
	}
	return named;
}

SOFT_EXPORT int ibv_dereg_mr(struct ibv_mr *mr)
{
	struct soft_mr *soft = (struct soft_mr *)mr;

	if (soft_fails(NULL, "ibv_dereg_mr"))
		return errno;
	soft_lock();
	if (fabric.mrs[mr->lkey >> 8] != soft)
		soft_abort("ibv_dereg_mr: %p is not registered", (void *)mr);
	if (!soft_context_of(mr->context)->gone && mr_is_named(soft))
		soft_abort("ibv_dereg_mr: a work request names it whose completion was not polled");
	fabric.mrs[mr->lkey >> 8] = NULL;
	fabric.registered -= mr->length;
	((struct soft_pd *)mr->pd)->users--;
	soft_context_of(mr->context)->objects--;
	soft->device->counts.mrs--;
	soft_unlock();
	if (soft->mapping)
		(void)munmap(soft->mapping, soft->mapping_bytes);
	free(soft);
	return 0;
}

uint8_t *soft_bytes(const struct ibv_pd *pd, uint32_t key, uint64_t address, uint64_t length, uint32_t access)
{
	uint32_t slot = key >> 8;
	const struct soft_mr *mr = slot < SOFT_MRS ? fabric.mrs[slot] : NULL;

	if (!mr || mr->mr.lkey != key || mr->mr.pd != pd)
		return NULL;
	if ((mr->access & access) != access)
		return NULL;
	if (address < mr->iova || address - mr->iova > mr->mr.length ||
	    length > mr->mr.length - (address - mr->iova))
		return NULL;
	return mr->memory + (address - mr->iova);
}
