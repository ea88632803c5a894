/* SPDX-License-Identifier: Apache-2.0 */
/* Regions: a client's file mapped and registered on every rail of its group; memory of a device, on those that reach it. */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "barrier.h"
#include "parts.h"

void tfd_region_destroy(struct tfd_region *region)
{
	struct tfd_group *group = region->session->group;

	for (uint32_t i = 0; i < region->rail_count; i++) {
		if (region->mrs[i])
			group->rails[i].ops->mr_close(group->rails[i].domain, region->mrs[i]);
	}
	if (!region->device) {
		tfd_guard_remove(region);
		(void)munmap(region->base, region->map_bytes);
		(void)close(region->fd);
	}
	free(region);
}

bool tfd_region_probe(struct tfd_region *region)
{
	struct tfd_event event = { .type = TFD_EVENT_REGION_BROKEN,
	                           .id = region->handle,
	                           .session = region->session->handle };
	struct stat file;

	if (region->device) /* its owner keeps it: who registered it holds it, too */
		return false;
	if (fstat(region->fd, &file) != 0 || (uint64_t)file.st_size < region->file_end)
		tfd_store_relaxed(&region->broken, 1);
	if (!tfd_load_relaxed(&region->broken))
		return false;
	if (!region->broken_told) {
		region->broken_told = true;
		tfd_event_post(region->session->group->worker, &event);
	}
	return true;
}

struct region_call {
	struct tfd_session *session;
	struct tfd_region *region;
	uint64_t handle;
	struct tfd_region_key *keys;
	uint32_t max;
};

static uint32_t bucket_of(uint64_t key)
{
	return (uint32_t)(key * 0x9e3779b97f4a7c15ull >> 40) % TFD_KEY_BUCKETS;
}

void tfd_region_unlink(struct tfd_region *region)
{
	for (uint32_t i = 0; i < region->rail_count; i++)
		tfd_list_remove(&region->key_links[i]);
}

const struct tfd_region *tfd_region_find(const struct tfd_rail *rail, uint32_t name_space, uint64_t key)
{
	const struct tfd_list *bucket = &rail->regions[bucket_of(key)];

	for (const struct tfd_list *link = bucket->next; link != bucket; link = link->next) {
		const struct tfd_region *region =
			tfd_container(link, struct tfd_region, key_links[rail->index]);

		if (region->keys[rail->index].key == key && region->session->name_space == name_space)
			return region;
	}
	return NULL;
}

static int add_command(struct tfd_worker *worker, void *argument)
{
	struct region_call *call = argument;
	struct tfd_region *region = call->region;
	int rc;

	if (call->session->state >= TFD_STATE_ENDING)
		return -ESHUTDOWN;
	rc = tfd_table_add(&call->session->regions, region, &region->handle);
	for (uint32_t i = 0; !rc && i < region->rail_count; i++) {
		if (region->mrs[i])
			tfd_list_push(&worker->group->rails[i].regions[bucket_of(region->keys[i].key)],
			              &region->key_links[i]);
		else if (!region->device) /* before any job reads it: nothing is posted there any more */
			tfd_rail_gone(worker, &worker->group->rails[i]);
	}
	return rc;
}

static int remove_command(struct tfd_worker *worker, void *argument)
{
	struct region_call *call = argument;
	struct tfd_region *region = tfd_table_get(&call->session->regions, call->handle);

	(void)worker;
	if (!region)
		return -ENOENT;
	if (region->jobs)
		return -EBUSY;
	call->region = tfd_table_remove(&call->session->regions, call->handle);
	tfd_region_unlink(region);
	return 0;
}

static int keys_command(struct tfd_worker *worker, void *argument)
{
	struct region_call *call = argument;
	struct tfd_region *region = tfd_table_get(&call->session->regions, call->handle);

	(void)worker;
	if (!region)
		return -ENOENT;
	if (call->max < region->rail_count)
		return -EINVAL;
	memcpy(call->keys, region->keys, region->rail_count * sizeof(*region->keys));
	return 0;
}

static int region_map(struct tfd_region *region, const struct tfd_region_options *options,
                      struct tfd_error *error)
{
	int protection = options->writable ? PROT_READ | PROT_WRITE : PROT_READ;
	struct statfs system;
	struct stat file;
	void *base;

	if (fstat(options->fd, &file) != 0 || fstatfs(options->fd, &system) != 0)
		return tfd_fail(error, -errno, "the memory's fd cannot be examined: %s", strerror(errno));
	if (!options->length || options->offset > (uint64_t)file.st_size ||
	    options->length > (uint64_t)file.st_size - options->offset)
		return tfd_fail(error, -EINVAL, "offset %llu and length %llu leave the memory's %llu bytes",
		                (unsigned long long)options->offset, (unsigned long long)options->length,
		                (unsigned long long)file.st_size);
	base = mmap(NULL, options->length, protection, MAP_SHARED, options->fd, (off_t)options->offset);
	if (base == MAP_FAILED)
		return tfd_fail(error, -errno, "mapping %llu bytes failed: %s",
		                (unsigned long long)options->length, strerror(errno));
	/* hugetlbfs maps, unmaps and replaces whole huge pages only. */
	region->map_bytes = (options->length + (uint64_t)system.f_bsize - 1) / (uint64_t)system.f_bsize *
	                    (uint64_t)system.f_bsize;
	region->fd = fcntl(options->fd, F_DUPFD_CLOEXEC, 0);
	if (region->fd < 0) {
		int rc = -errno;

		(void)munmap(base, region->map_bytes);
		return tfd_fail(error, rc, "no file descriptor is left: %s", strerror(-rc));
	}
	region->base = base;
	region->length = options->length;
	region->file_end = options->offset + options->length;
	region->writable = options->writable != 0;
	return 0;
}

int tfd_dmabuf_size(int fd, uint64_t *bytes)
{
	struct statfs system;
	off_t size;

	/* A name in /proc can be that of a file; the kind of its file system cannot be forged. */
	if (fstatfs(fd, &system) != 0 || system.f_type != DMA_BUF_MAGIC)
		return -EINVAL;
	size = lseek(fd, 0, SEEK_END);
	if (size <= 0)
		return -EINVAL;
	*bytes = (uint64_t)size;
	return 0;
}

static int region_name(struct tfd_region *region, const struct tfd_region_options *options,
                       struct tfd_error *error)
{
	if (!options->length || options->length > UINT64_MAX - options->address ||
	    options->length > UINT64_MAX - options->memory_offset)
		return tfd_fail(error, -EINVAL, "%llu bytes at address %llx are no memory of a device",
		                (unsigned long long)options->length, (unsigned long long)options->address);
	region->device = true;
	region->fd = -1;
	region->base = (uint8_t *)(uintptr_t)options->address;
	region->length = options->length;
	region->writable = options->writable != 0;
	return 0;
}

/* A rail that cannot reach it has no key for it. */
static int device_register(const struct tfd_rail *rail, struct tfd_region *region,
                           const struct tfd_region_options *options, struct tfd_error *error)
{
	const struct tfd_dmabuf dmabuf = { .fd = options->fd,
	                                   .offset = options->offset,
	                                   .length = options->length,
	                                   .address = options->address };
	const struct tfd_device_memory memory = { .number = options->memory,
	                                          .offset = options->memory_offset,
	                                          .length = options->length,
	                                          .address = options->address };
	int rc;

	if (options->memory && rail->ops->mr_open_device)
		return rail->ops->mr_open_device(rail->domain, &memory, region->writable,
		                                 &region->mrs[rail->index], &region->keys[rail->index],
		                                 error);
	if (options->fd < 0 || !rail->ops->mr_open_dmabuf)
		return 0;
	rc = rail->ops->mr_open_dmabuf(rail->domain, &dmabuf, region->writable, &region->mrs[rail->index],
	                               &region->keys[rail->index], error);
	return rc == -EOPNOTSUPP ? 0 : rc;
}

static int region_register(struct tfd_region *region, const struct tfd_region_options *options,
                           struct tfd_error *error)
{
	struct tfd_group *group = region->session->group;

	for (uint32_t i = 0; i < group->rail_count; i++) {
		struct tfd_rail *rail = &group->rails[i];
		int rc = region->device ? device_register(rail, region, options, error) :
		                          rail->ops->mr_open(rail->domain, region->base, region->length,
		                                             region->writable ? TFD_MR_WRITABLE : 0,
		                                             &region->mrs[i], &region->keys[i], error);

		tfd_list_init(&region->key_links[i]);
		if (rc && tfd_rail_state(rail) != TFD_RAIL_GONE) /* else the other rails carry on */
			return rc;
		region->rail_count++;
	}
	return 0;
}

int tfd_region_add(struct tfd_core *core, uint64_t session, const struct tfd_region_options *options,
                   uint64_t *handle, struct tfd_error *error)
{
	struct region_call call = { 0 };
	struct tfd_region *region;
	int rc;

	call.session = tfd_session_get(core, session);
	if (!call.session)
		return tfd_fail(error, -ENOENT, "the session has ended");
	region = calloc(1, sizeof(*region));
	rc = region ? 0 : tfd_fail(error, -ENOMEM, "no memory for a region");
	if (rc)
		goto out;
	region->session = call.session;
	call.region = region;
	rc = options->device ? region_name(region, options, error) : region_map(region, options, error);
	if (rc)
		goto err_free;
	rc = region->device ? 0 : tfd_guard_add(region);
	if (rc) {
		rc = tfd_fail(error, rc, "the daemon holds too many regions");
		goto err_unmap;
	}
	rc = region_register(region, options, error);
	if (rc)
		goto err_destroy;
	rc = tfd_command_run(call.session->group->worker, add_command, &call);
	if (rc) {
		rc = tfd_fail(error, rc, "the session has ended or has no room: %s", strerror(-rc));
		goto err_destroy;
	}
	*handle = region->handle;
	goto out;

err_destroy:
	tfd_region_destroy(region);
	goto out;
err_unmap:
	(void)munmap(region->base, region->map_bytes);
	(void)close(region->fd);
err_free:
	free(region);
out:
	tfd_session_put(call.session);
	return rc;
}

int tfd_region_remove(struct tfd_core *core, uint64_t session, uint64_t region)
{
	struct region_call call = { .handle = region };
	int rc;

	call.session = tfd_session_get(core, session);
	if (!call.session)
		return -ENOENT;
	rc = tfd_command_run(call.session->group->worker, remove_command, &call);
	if (!rc)
		tfd_region_destroy(call.region);
	tfd_session_put(call.session);
	return rc;
}

int tfd_region_keys(struct tfd_core *core, uint64_t session, uint64_t region, struct tfd_region_key *keys,
                    uint32_t max)
{
	struct region_call call = { .handle = region, .keys = keys, .max = max };
	int rc;

	call.session = tfd_session_get(core, session);
	if (!call.session)
		return -ENOENT;
	rc = tfd_command_run(call.session->group->worker, keys_command, &call);
	tfd_session_put(call.session);
	return rc;
}
