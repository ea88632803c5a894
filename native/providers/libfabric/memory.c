/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Registration as the returned mr_mode asks (fi_mr(3), fi_domain(3)), and of memory that a dma-buf's fd names (fi_mr(3), FI_MR_DMABUF).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "../../core/parts.h"
#include "domain.h"

/* Of headers from 1.20 on, which those of 1.17 have not. */
#define MR_DMABUF (1ull << 40)
struct dmabuf {
	int fd;
	uint64_t offset; /* of what is registered, into it */
	size_t length;
	void *base; /* what the dma-buf's own first byte is called */
};

/* A later library looks at more of the attributes, if the API that was asked for has them. */
struct attributes {
	struct fi_mr_attr attr;
	uint64_t later[8]; /* 0 */
};

static uint64_t access_of(uint32_t access)
{
	return FI_WRITE | (access & TFD_MR_UNREADABLE ? 0 : FI_REMOTE_READ) |
	       (access & TFD_MR_WRITABLE ? FI_READ | FI_REMOTE_WRITE : 0);
}

int tfd_fi_mr_open(struct tfd_domain *domain, void *address, size_t length, uint32_t access,
                   struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	int mode = domain->info->domain_attr->mr_mode;
	struct tfd_mr *mr = calloc(1, sizeof(*mr));
	uint64_t wanted = 0;
	int rc;

	if (!mr)
		return tfd_fail(error, -ENOMEM, "no memory for a registration");
	/* Where the key is ours to choose it is a secret: nobody guesses his way into a region. */
	if (!(mode & FI_MR_PROV_KEY) && getrandom(&wanted, sizeof(wanted), 0) != (ssize_t)sizeof(wanted)) {
		free(mr);
		return tfd_fail(error, -EIO, "getrandom gave no key");
	}
	if (domain->info->domain_attr->mr_key_size < sizeof(wanted))
		wanted &= (1ull << (8 * domain->info->domain_attr->mr_key_size)) - 1;
	rc = fi_mr_reg(domain->domain, address, length, access_of(access), 0, wanted, 0, &mr->mr, NULL);
	if (rc) {
		free(mr);
		if (rc == -FI_ENOMEM)
			return tfd_fail(error, -ENOMEM,
			                "registering %zu bytes failed: raise the memlock limit (ulimit -l, "
			                "LimitMEMLOCK)",
			                length);
		return tfd_fi_fail(domain, error, "fi_mr_reg", rc);
	}
	mr->descriptor = fi_mr_desc(mr->mr);
	key->key = fi_mr_key(mr->mr);
	key->address = mode & FI_MR_VIRT_ADDR ? (uint64_t)(uintptr_t)address : 0;
	*out = mr;
	return 0;
}

/*
 * Memory of the interface "system", whatever it is: to have it be CUDA's, libfabric would have to have the CUDA driver in this process. Nothing that
 * registers or moves it by the device asks for more.
 */
static int dmabuf_register(struct tfd_domain *domain, const struct tfd_dmabuf *dmabuf, int writable,
                           struct fid_mr **out)
{
	struct dmabuf named = { .fd = dmabuf->fd,
	                        .offset = dmabuf->offset,
	                        .length = dmabuf->length,
	                        .base = (void *)(uintptr_t)(dmabuf->address - dmabuf->offset) };
	struct attributes attributes = { .attr = { .mr_iov = (const void *)&named,
	                                           .iov_count = 1,
	                                           .access = access_of(writable ? TFD_MR_WRITABLE : 0),
	                                           .iface = FI_HMEM_SYSTEM } };

	errno = EOPNOTSUPP; /* a library that was built without ibv_reg_dmabuf_mr answers with whatever it is */
	return fi_mr_regattr(domain->domain, &attributes.attr, MR_DMABUF, out);
}

int tfd_fi_mr_open_dmabuf(struct tfd_domain *domain, const struct tfd_dmabuf *dmabuf, int writable,
                          struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	struct tfd_mr *mr;
	int rc;

	if (!domain->takes_dmabuf)
		return tfd_fail(error, -EOPNOTSUPP,
		                "libfabric provider %s, fabric %s, takes no dma-buf: efa-direct does "
		                "(libfabric 2.2, devices with RDMA write), if all it writes can be left to "
		                "the device",
		                domain->info->fabric_attr->prov_name, domain->info->fabric_attr->name);
	mr = calloc(1, sizeof(*mr));
	if (!mr)
		return tfd_fail(error, -ENOMEM, "no memory for a registration");
	rc = dmabuf_register(domain, dmabuf, writable, &mr->mr);
	if (rc) {
		free(mr);
		if (rc == -FI_EOPNOTSUPP || rc == -FI_ENOSYS || rc == -FI_EBADFLAGS)
			return tfd_fail(error, -EOPNOTSUPP,
			                "registering %llu bytes of a dma-buf failed: the device's driver, "
			                "rdma-core (34) "
			                "or libfabric is too old for it: %s",
			                (unsigned long long)dmabuf->length, domain->library->strerror(-rc));
		return tfd_fi_fail(domain, error, "fi_mr_regattr of a dma-buf", rc);
	}
	mr->descriptor = fi_mr_desc(mr->mr);
	key->key = fi_mr_key(mr->mr);
	key->address = dmabuf->address; /* EFA's are virtual addresses */
	*out = mr;
	return 0;
}

void tfd_fi_mr_close(struct tfd_domain *domain, struct tfd_mr *mr)
{
	(void)domain;
	(void)fi_close(&mr->mr->fid);
	free(mr);
}
