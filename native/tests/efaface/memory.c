/* SPDX-License-Identifier: Apache-2.0 */
/* Memory registrations of EFA's face: of the process's memory, and of a dma-buf, which any file that can be mapped passes for. */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "face.h"

#define CONTAINER(pointer, type) ((type *)(void *)(pointer)) /* each fid is the first member */
#define DMABUF_SINCE FI_VERSION(1, 20) /* API */
#define PAGE 4096u

static int mr_close(struct fid *fid)
{
	struct face_mr *mr = CONTAINER(fid, struct face_mr);
	struct face_mr **at;
	int rc = fi_close(&mr->tcp->fid);

	face_lock();
	for (at = &mr->domain->mrs; *at != mr;)
		at = &(*at)->next;
	*at = mr->next;
	if (mr->mapping)
		face_stats.dmabufs--;
	face_unlock();
	if (mr->mapping)
		(void)munmap(mr->mapping, mr->mapping_bytes);
	free(mr);
	return rc;
}

static struct fi_ops mr_fid_ops = {
	.size = sizeof(struct fi_ops),
	.close = mr_close,
	.bind = face_no_bind,
	.control = face_no_control,
};

/* Takes over what `from` says of it, the mapping too if it succeeds. */
static int mr_make(struct face_domain *domain, const struct face_mr *from, uint64_t key, void *context,
                   struct fid_mr **out)
{
	struct face_mr *mr = calloc(1, sizeof(*mr));
	int rc;

	if (!mr)
		return -FI_ENOMEM;
	*mr = *from;
	rc = fi_mr_reg(domain->tcp, mr->memory, mr->length, mr->access, 0, key, 0, &mr->tcp, NULL);
	if (rc) {
		free(mr);
		return rc;
	}
	if (fi_mr_key(mr->tcp) > UINT32_MAX)
		face_abort("tcp's key has more than the 4 bytes of EFA's");
	mr->fid = (struct fid_mr){
		.fid = { .fclass = FI_CLASS_MR, .context = context, .ops = &mr_fid_ops },
		.mem_desc = mr,
		.key = fi_mr_key(mr->tcp),
	};
	mr->domain = domain;
	face_lock();
	mr->next = domain->mrs;
	domain->mrs = mr;
	if (mr->mapping)
		face_stats.dmabufs++;
	face_unlock();
	*out = &mr->fid;
	return 0;
}

int face_mr_reg(struct fid *domain, const void *buf, size_t length, uint64_t access, uint64_t offset,
                uint64_t key, uint64_t flags, struct fid_mr **out, void *context)
{
	struct face_mr mr = { .address = (uint64_t)(uintptr_t)buf,
	                      .length = length,
	                      .access = access,
	                      .memory = (uint8_t *)(uintptr_t)buf };

	return offset || flags ? -FI_EBADFLAGS :
	                         mr_make(CONTAINER(domain, struct face_domain), &mr, key, context, out);
}

/* As the kernel: pages, and nothing beyond its end. */
static int dmabuf_map(const struct face_dmabuf *dmabuf, struct face_mr *mr)
{
	uint64_t first = dmabuf->offset & ~(uint64_t)(PAGE - 1);
	off_t size = lseek(dmabuf->fd, 0, SEEK_END);

	mr->address = (uint64_t)(uintptr_t)dmabuf->base_addr + dmabuf->offset;
	mr->length = dmabuf->len;
	if (size < 0)
		return -errno;
	if (!dmabuf->len || dmabuf->offset > (uint64_t)size ||
	    dmabuf->len > (uint64_t)size - dmabuf->offset || (mr->address ^ dmabuf->offset) % PAGE)
		return -FI_EINVAL;
	mr->mapping_bytes = (size_t)(dmabuf->offset - first) + dmabuf->len;
	mr->mapping =
		mmap(NULL, mr->mapping_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, dmabuf->fd, (off_t)first);
	if (mr->mapping == MAP_FAILED)
		return -errno;
	mr->memory = mr->mapping + (dmabuf->offset - first);
	return 0;
}

int face_mr_regattr(struct fid *fid, const struct fi_mr_attr *attr, uint64_t flags, struct fid_mr **out)
{
	struct face_domain *domain = CONTAINER(fid, struct face_domain);
	struct face_mr mr = { .access = attr->access };
	int rc;

	if (flags != FACE_MR_DMABUF || FI_VERSION_LT(domain->fabric->api_version, DMABUF_SINCE))
		return -FI_EBADFLAGS;
	if (attr->iov_count != 1)
		return -FI_EINVAL;
	if (attr->iface != FI_HMEM_SYSTEM) /* the driver of any other is not in this process */
		return -FI_ENOSYS;
	if (!domain->fabric->direct)
		face_abort("a dma-buf on fabric efa: what that emulates processors write to it");
	if (face_control.dmabuf != 1)
		return -(face_control.dmabuf ? (int)face_control.dmabuf : errno);
	rc = dmabuf_map((const void *)attr->mr_iov, &mr);
	if (!rc)
		rc = mr_make(domain, &mr, attr->requested_key, attr->context, out);
	if (rc && mr.memory)
		(void)munmap(mr.mapping, mr.mapping_bytes);
	return rc;
}

const struct face_mr *face_mr_find(const struct face_domain *domain, uint64_t key, uint64_t address,
                                   uint64_t length, uint64_t access)
{
	const struct face_mr *mr = domain->mrs;

	while (mr && mr->fid.key != key)
		mr = mr->next;
	return mr && address >= mr->address && length <= mr->length &&
	                       address - mr->address <= mr->length - length && (mr->access & access) ?
	               mr :
	               NULL;
}

uint8_t *face_mr_bytes(const struct face_mr *mr, uint64_t address)
{
	return mr->memory + (address - mr->address);
}
