/* SPDX-License-Identifier: Apache-2.0 */
/* What a lane puts on its stream: kernels of client/cuda/kernels/pages.cu, which knows these parameters, or a copy of the driver's. */
#include <errno.h>
#include <stdbool.h>

#include "lane.h"

#define THREADS 256u /* of a block */
#define WARP 32u
#define SMALL_PAGE 2048u /* a warp each */
#define CHUNK_MIN 8192u /* bytes of a page that one block copies, a multiple of 16 */
#define CHUNK_MAX (256u << 10)
#define BLOCKS_WANTED 1024u /* what the multiprocessors of a large device hold at once, at 8 each */
#define GRID_Y_MAX 65535u
#define BUFFER_ID 7 /* CU_POINTER_ATTRIBUTE_ */
#define SLICE_CHUNK (16u << 10) /* of a plan's slice */

typedef int (*launch_fn)(void *function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                         unsigned int block_x, unsigned int block_y, unsigned int block_z,
                         unsigned int shared, void *stream, void **parameters, void **extra);
typedef int (*memcpy_fn)(uint64_t dst, uint64_t src, size_t bytes, void *stream);
typedef int (*value_fn)(void *stream, uint64_t address, uint64_t value, unsigned int flags);
typedef int (*context_fn)(void **context);
typedef int (*push_fn)(void *context);
typedef int (*id_fn)(void *stream, uint64_t *id);
typedef int (*capturing_fn)(void *stream, int *capturing);
typedef int (*attribute_fn)(void *out, int attribute, uint64_t address);

uint64_t tfd_cuda_buffer_id(void *pointer_get_attribute, uint64_t address)
{
	uint64_t id = 0;

	return ((attribute_fn)pointer_get_attribute)(&id, BUFFER_ID, address) ? 0 : id;
}

/* Makes the lane's context current; *pushed: it has to be popped. */
static int enter(const struct tfd_lane *lane, bool *pushed)
{
	const struct tfd_cuda_driver *driver = &lane->options.driver;
	void *current = NULL;
	int result = ((context_fn)driver->ctx_get_current)(&current);

	*pushed = false;
	if (result || current == lane->options.context)
		return result;
	result = ((push_fn)driver->ctx_push_current)(lane->options.context);
	*pushed = !result;
	return result;
}

static void leave(const struct tfd_lane *lane, bool pushed)
{
	void *popped;

	if (pushed)
		(void)((context_fn)lane->options.driver.ctx_pop_current)(&popped);
}

/* Bytes that one block copies of each of `count` pieces of up to `longest` bytes. */
static uint64_t chunk_of(uint64_t longest, uint64_t count)
{
	uint64_t blocks = count < BLOCKS_WANTED ? BLOCKS_WANTED / count : 1;
	uint64_t chunk = ((longest + blocks - 1) / blocks + CHUNK_MIN - 1) / CHUNK_MIN * CHUNK_MIN;
	uint64_t least = (longest / GRID_Y_MAX / CHUNK_MIN + 1) * CHUNK_MIN;

	if (chunk > CHUNK_MAX)
		chunk = CHUNK_MAX;
	return chunk > least ? chunk : least;
}

struct shape {
	uint64_t chunk;
	unsigned int grid_x, grid_y, block_x, block_y;
};

/* A block takes a chunk of one piece, or several small pieces, a warp each. */
static struct shape shape_of(uint64_t longest, uint32_t count)
{
	struct shape shape = { .chunk = chunk_of(longest, count), .block_x = THREADS, .block_y = 1 };

	if (longest <= SMALL_PAGE) {
		shape.block_x = WARP;
		shape.block_y = THREADS / WARP;
	}
	shape.grid_x = (count + shape.block_y - 1) / shape.block_y;
	shape.grid_y = longest ? (unsigned int)((longest + shape.chunk - 1) / shape.chunk) : 1;
	return shape;
}

static int launch(const struct tfd_lane *lane, void *function, const struct shape *shape, void **parameters)
{
	return ((launch_fn)lane->options.driver.launch_kernel)(function, shape->grid_x, shape->grid_y, 1,
	                                                       shape->block_x, shape->block_y, 1, 0,
	                                                       lane->options.stream, parameters, NULL);
}

/* Where something of the segment lies for the device. */
static uint64_t device_address(const struct tfd_lane *lane, const void *at)
{
	return lane->options.segment + (uint64_t)((const uint8_t *)at - lane->client->base);
}

static int launch_pages(const struct tfd_lane *lane, const struct tfd_entry *entry,
                        const struct tfd_copy *copy, uint64_t marks)
{
	uint32_t count = entry->table_count ? entry->table_count : 1;
	struct shape shape = shape_of(entry->length, count);
	uint64_t src = copy->src + entry->src_offset;
	uint64_t dst = copy->dst + entry->dst_offset;
	uint64_t table =
		entry->table_count ? device_address(lane, lane->client->arena_base + entry->table_offset) : 0;
	uint64_t word = device_address(lane, lane->word);
	void *parameters[] = {
		&src,
		&dst,
		(void *)&entry->src_stride,
		(void *)&entry->dst_stride,
		(void *)&entry->length,
		&table,
		&count,
		&shape.chunk,
		&marks,
		&word,
		(void *)&entry->fire_at,
		(void *)&lane->options.watcher,
	};

	return launch(lane, lane->options.pages, &shape, parameters);
}

static uint64_t longest_of(const struct tfd_target *targets, uint32_t count)
{
	uint64_t longest = 0;

	for (uint32_t i = 0; i < count; i++)
		longest = targets[i].length > longest ? targets[i].length : longest;
	return longest;
}

static int launch_targets(const struct tfd_lane *lane, const struct tfd_entry *entry,
                          const struct tfd_copy *copy, uint64_t marks)
{
	const void *targets = lane->client->arena_base + entry->table_offset;
	struct shape shape = shape_of(longest_of(targets, entry->table_count), entry->table_count);
	uint64_t src = copy->src;
	uint64_t table = device_address(lane, targets);
	/* behind the targets, as tfd_client_table_fill has it */
	uint64_t places = table + (uint64_t)entry->table_count * sizeof(struct tfd_target);
	uint32_t count = entry->table_count;
	uint64_t word = device_address(lane, lane->word);
	void *parameters[] = {
		&src,
		&table,
		&places,
		&count,
		&shape.chunk,
		&marks,
		&word,
		(void *)&entry->fire_at,
		(void *)&lane->options.watcher,
	};

	return launch(lane, lane->options.targets, &shape, parameters);
}

static int word_write(const struct tfd_lane *lane, const struct tfd_entry *entry)
{
	return ((value_fn)lane->options.driver.write_value)(
		lane->options.stream, device_address(lane, lane->word), entry->fire_at, 0);
}

/* How many pages there are, from 0 on, that end before `end`, and can be named. */
static uint64_t pages_within(uint64_t first, uint64_t stride, uint64_t length, uint64_t end)
{
	if (first > end || length > end - first)
		return 0;
	return stride ? (end - first - length) / stride + 1 : UINT64_MAX;
}

/* Which pages, its rows say when the stream gets there; a launch has blocks for as many as there may be. */
static int launch_plan_pages(const struct tfd_lane *lane, const struct tfd_entry *entry,
                             const struct tfd_copy *copy, uint64_t head, uint64_t marks)
{
	struct shape shape = shape_of(entry->length, entry->table_count);
	uint64_t src = copy->src + entry->src_offset;
	uint64_t dst = copy->dst + entry->dst_offset;
	uint64_t src_legal =
		pages_within(entry->src_offset, entry->src_stride, entry->length, copy->src_bytes);
	uint64_t dst_legal =
		pages_within(entry->dst_offset, entry->dst_stride, entry->length, copy->dst_bytes);
	uint64_t word = device_address(lane, lane->word);
	void *parameters[] = {
		&src,
		&dst,
		(void *)&entry->src_stride,
		(void *)&entry->dst_stride,
		(void *)&entry->length,
		&head,
		(void *)&entry->table_count,
		&src_legal,
		&dst_legal,
		&shape.chunk,
		&marks,
		&word,
		(void *)&entry->fire_at,
		(void *)&lane->options.watcher,
	};

	return launch(lane, lane->options.plan_pages, &shape, parameters);
}

/* How long a slice is nobody knows yet: so its blocks go over it in turns. */
static struct shape slices_shape(uint64_t longest, uint32_t count)
{
	uint64_t most = count < BLOCKS_WANTED ? BLOCKS_WANTED / count : 1;
	uint64_t blocks = longest / SLICE_CHUNK + 1;

	return (struct shape){ .chunk = SLICE_CHUNK,
	                       .grid_x = count,
	                       .grid_y = (unsigned int)(blocks < most ? blocks : most),
	                       .block_x = THREADS,
	                       .block_y = 1 };
}

static int launch_plan_slices(const struct tfd_lane *lane, const struct tfd_entry *entry,
                              const struct tfd_copy *copy, uint64_t head, uint64_t places, uint64_t marks)
{
	uint32_t count = entry->op == TFD_OP_WRITE ? 1 : entry->table_count;
	uint64_t src = copy->src + entry->src_offset;
	/* What the daemon has slices be within: the window of its table, or all of the region. */
	uint64_t src_bytes = entry->flags & TFD_FLAG_TABLE ? entry->length : copy->src_bytes;
	struct shape shape = slices_shape(src_bytes, count);
	uint64_t word = device_address(lane, lane->word);
	void *parameters[] = {
		&src,
		&src_bytes,
		&head,
		&places,
		&count,
		&shape.chunk,
		&marks,
		&word,
		(void *)&entry->fire_at,
		(void *)&lane->options.watcher,
	};

	return launch(lane, lane->options.plan_slices, &shape, parameters);
}

static int memcpy_enqueue(const struct tfd_lane *lane, const struct tfd_entry *entry,
                          const struct tfd_copy *copy)
{
	int result = ((memcpy_fn)lane->options.driver.memcpy_dtod_async)(copy->dst + entry->dst_offset,
	                                                                 copy->src + entry->src_offset,
	                                                                 entry->length, lane->options.stream);

	return result ? result : word_write(lane, entry);
}

static int write_enqueue(const struct tfd_lane *lane, const struct tfd_entry *entry,
                         const struct tfd_copy *copy, uint64_t marks)
{
	if (!entry->length)
		return word_write(lane, entry);
	if (!copy->trigger && entry->length >= TFD_LANE_MEMCPY_MIN)
		return memcpy_enqueue(lane, entry, copy);
	return launch_pages(lane, entry, copy, marks);
}

/* Of a read: from the grant into the region. */
static int read_enqueue(const struct tfd_lane *lane, const struct tfd_entry *entry,
                        const struct tfd_copy *copy, uint64_t marks)
{
	const struct tfd_copy back = { .src = copy->dst, .dst = copy->src, .trigger = copy->trigger };
	struct tfd_entry write = *entry;

	write.src_offset = entry->dst_offset;
	write.dst_offset = entry->src_offset;
	return write_enqueue(lane, &write, &back, marks);
}

/* Kernels store the word themselves. */
static int copy_enqueue(const struct tfd_lane *lane, const struct tfd_entry *entry,
                        const struct tfd_copy *copy)
{
	uint64_t marks = copy->trigger ? device_address(lane, lane->marks) : 0;

	if (entry->op == TFD_OP_WRITE)
		return write_enqueue(lane, entry, copy, marks);
	if (entry->op == TFD_OP_READ)
		return read_enqueue(lane, entry, copy, marks);
	if (!entry->table_count)
		return word_write(lane, entry);
	if (entry->op == TFD_OP_SCATTER)
		return launch_targets(lane, entry, copy, marks);
	return launch_pages(lane, entry, copy, marks);
}

/* One that was closed before the launch was published is nothing to the daemon either. */
static int plan_enqueue(const struct tfd_lane *lane, const struct tfd_entry *entry,
                        const struct tfd_copy *copy)
{
	uint64_t arena = device_address(lane, lane->client->arena_base);
	uint64_t marks = copy->trigger ? device_address(lane, lane->marks) : 0;
	uint64_t head, places;
	struct tfd_entry plan;

	if (!tfd_client_plan_entry(lane->client, entry->plan, &plan, &head, &places))
		return word_write(lane, entry);
	plan.fire_at = entry->fire_at;
	if (plan.op == TFD_OP_WRITE_PAGES)
		return launch_plan_pages(lane, &plan, copy, arena + head, marks);
	if ((plan.op == TFD_OP_WRITE && plan.flags & TFD_FLAG_TABLE) || plan.op == TFD_OP_SCATTER)
		return launch_plan_slices(lane, &plan, copy, arena + head, arena + places, marks);
	return copy_enqueue(lane, &plan, copy);
}

int tfd_lane_look(const struct tfd_lane *lane)
{
	const struct tfd_cuda_driver *driver = &lane->options.driver;
	uint64_t id = 0;
	int capturing = 0;
	bool pushed;
	int result;

	if (!lane->options.foreign)
		return 0;
	result = enter(lane, &pushed);
	if (!result)
		result = ((capturing_fn)driver->stream_capturing)(lane->options.stream, &capturing);
	if (!result && !capturing) /* which would spoil a capture */
		result = ((id_fn)driver->stream_get_id)(lane->options.stream, &id);
	leave(lane, pushed);
	if (capturing)
		return -EBUSY;
	return result || id != lane->options.stream_id ? -ESTALE : 0;
}

int tfd_lane_enqueue(const struct tfd_lane *lane, const struct tfd_entry *entry, const struct tfd_copy *copy)
{
	bool pushed;
	int result = enter(lane, &pushed);

	if (!result && copy->trigger)
		result = ((value_fn)lane->options.driver.wait_value)(lane->options.stream, copy->trigger,
		                                                     copy->trigger_at, 0 /* GEQ */);
	if (!result)
		result = entry->op == TFD_OP_LAUNCH ? plan_enqueue(lane, entry, copy) :
		                                      copy_enqueue(lane, entry, copy);
	leave(lane, pushed);
	return result;
}
