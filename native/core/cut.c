/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cutting a job into shards. A large write is cut in 1, 2, 4 or 8 equal parts, each of which carries that part of the count; pages
 * are dealt in runs, one for each path; a target of a scatter goes whole, by its open's paths in turn.
 */
#include "parts.h"

/*
 * Memory of a device is reached by a rail that has registered it, and by no other: at neither end. `region`: NULL: there are no bytes,
 * which any path carries.
 */
static bool could_reach(const struct tfd_open *open, const struct tfd_path *path,
                        const struct tfd_region *region)
{
	return !region ||
	       ((!open->device || path->key) && (!region->device || region->mrs[path->conn->rail->index]));
}

/* Whether a path that is no last resort could, alive or not. */
static bool reached_directly(const struct tfd_open *open, const struct tfd_region *region)
{
	for (uint32_t i = 0; i < open->path_count; i++) {
		if (!open->paths[i].conn->rail->last_resort && could_reach(open, &open->paths[i], region))
			return true;
	}
	return false;
}

static bool reaches(const struct tfd_open *open, const struct tfd_path *path, const struct tfd_region *region)
{
	return could_reach(open, path, region) &&
	       (!path->conn->rail->last_resort || !reached_directly(open, region));
}

bool tfd_open_reaches(const struct tfd_open *open, const struct tfd_region *region)
{
	for (uint32_t i = 0; i < open->path_count; i++) {
		if (could_reach(open, &open->paths[i], region))
			return true;
	}
	return false;
}

bool tfd_open_takes(const struct tfd_open *open, const struct tfd_region *region, bool reads, uint64_t bytes)
{
	return bytes != 1 || !(reads ? region->device : open->device) || reached_directly(open, region);
}

static bool moves_bytes(const struct tfd_shard *shard)
{
	const struct tfd_job *job = shard->job;

	return job->region && shard->length && !(job->flags & TFD_FLAG_COPIED) &&
	       (job->op != TFD_OP_WRITE_PAGES || job->length);
}

bool tfd_shard_goes_by(const struct tfd_shard *shard, uint8_t path)
{
	return reaches(shard->open, &shard->open->paths[path],
	               moves_bytes(shard) ? shard->job->region : NULL);
}

static uint32_t paths_alive(const struct tfd_open *open, const struct tfd_region *region)
{
	uint32_t alive = 0;

	for (uint32_t i = 0; i < open->path_count; i++)
		alive += open->paths[i].conn->half && !open->paths[i].conn->broken &&
		         reaches(open, &open->paths[i], region);
	return alive;
}

/* How many shards: at most the living paths, each at least `least` long; with `eighths` a power of two. At least 1. */
uint32_t tfd_cut_count(const struct tfd_open *open, const struct tfd_region *region, uint64_t length,
                       bool eighths, uint64_t least)
{
	uint32_t count = paths_alive(open, region);

	if (count > TFD_MAX_PARTS)
		count = TFD_MAX_PARTS;
	if (least && length / least < count)
		count = (uint32_t)(length / least);
	if (eighths && count)
		count = 1u << (31 - __builtin_clz(count));
	return count ? count : 1;
}

static bool pages_of(const struct tfd_job *job)
{
	return job->op == TFD_OP_WRITE_PAGES;
}

/* The units of each shard; pages that count one by one pay for what they have. */
static uint64_t shard_units(const struct tfd_job *job, const struct tfd_shard *shard)
{
	if (job->op == TFD_OP_READ || job->op == TFD_OP_SEND)
		return 0;
	if (pages_of(job) && !(job->flags & TFD_FLAG_COUNT_JOB))
		return 8 * shard->length;
	return job->open ? 8 / job->parts : 8;
}

/* Where a count rides on the data it counts, it must not arrive before that data. */
static bool shard_trails(const struct tfd_job *job, const struct tfd_shard *shard)
{
	const struct tfd_rail *rail = shard->open->paths[shard->path].conn->rail;

	if (!shard->length || !shard->units)
		return false;
	if (job->flags & (TFD_FLAG_EXACT | TFD_FLAG_CHECKSUM))
		return true;
	if (rail->info.ordered)
		return false;
	if (pages_of(job)) /* a page is one piece, with a count of its own */
		return (job->flags & TFD_FLAG_COUNT_JOB) || job->length > rail->segment_bytes;
	return shard->length > rail->segment_bytes;
}

static void choose_path(struct tfd_shard *shard)
{
	struct tfd_open *open = shard->open;

	shard->path = open->next_path < open->path_count ? open->next_path : 0;
	for (uint32_t i = 0; i < open->path_count; i++) {
		const struct tfd_conn *conn = open->paths[shard->path].conn;

		if (conn->half && !conn->broken && tfd_shard_goes_by(shard, shard->path))
			break;
		shard->path = (uint8_t)((shard->path + 1u) % open->path_count);
	}
	open->next_path = (uint8_t)((shard->path + 1u) % open->path_count);
}

/* Its open, extent and offsets are set. */
static void shard_plan(struct tfd_shard *shard)
{
	choose_path(shard);
	shard->units = shard_units(shard->job, shard);
	shard->trails = shard_trails(shard->job, shard);
}

void tfd_job_cut(struct tfd_job *job)
{
	uint64_t length = pages_of(job) ? job->counts : job->length;
	uint64_t part;

	if (!job->parts)
		return;
	if (!job->open) {
		for (uint32_t i = 0; i < job->parts; i++) {
			if (job->shards[i].open) /* else it has failed while the job was armed */
				shard_plan(&job->shards[i]);
		}
		return;
	}
	/* The last takes what does not divide; 8-byte steps keep the others aligned. */
	part = length / job->parts;
	if (!pages_of(job) && part >= TFD_LINE)
		part &= ~7ull;
	for (uint32_t i = 0; i < job->parts; i++) {
		struct tfd_shard *shard = &job->shards[i];

		shard->open = job->open;
		shard->src_offset = job->src_offset;
		shard->dst_offset = job->dst_offset;
		shard->first = i * part;
		shard->length = i + 1 < job->parts ? part : length - i * part;
		shard_plan(shard);
	}
}
