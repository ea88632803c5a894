/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What posting through verbs costs, on the null device of the double of libibverbs: nothing is carried, all that is posted is complete. One
 * thread: the passes are called by hand. Each peer is on a connection of its own, each post is a write of 256 bytes with an immediate.
 *
 *   verbs_cost LIBRARY worker PEERS POSTS ROUNDS    ns from taking a scatter out of the ring to its last doorbell, of each round
 *   verbs_cost LIBRARY provider PEERS POSTS ROUNDS  ns from the first post to the provider to their last doorbell
 *   verbs_cost LIBRARY device PEERS POSTS ROUNDS    ns that the device itself takes for those, a doorbell each
 *
 * Under callgrind, with --toggle-collect=cost_*, the first two tell instructions, until all is told to be done.
 */
#include <dlfcn.h>

#include "providers/verbs/verbs.h"
#include "tests/sim_pair.h"
#include "tests/softverbs/softverbs.h"

#define PEERS_MAX 64u
#define BYTES 256u
#define STRIDE 512u

static struct world {
	struct sim_pair pair; /* by verbs, in spite of its name */
	struct tfd_worker *worker;
	struct tfd_session *session;
	struct tfd_rail *rail;
	void (*counts)(const char *, struct softverbs_counts *);
} world;

static uint64_t clock_ns(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void host_open_on(struct host *host, const char *library)
{
	struct tfd_core_options core = { .max_sessions = 16, .stepped = 1 };
	struct tfd_group_options group = { .provider = "verbs", .rails = { "soft0" }, .rail_count = 1 };

	(void)snprintf(group.library, sizeof(group.library), "%s", library);
	CHECK_OK(tfd_core_open(&core, &host->core, &error));
	CHECK_OK(tfd_group_open(host->core, &group, &host->group, &error));
	host->core->groups[0]->worker->now_ns = tfd_now_ns();
}

/* Nobody is there who would give credits back. */
static void connect_unbounded(struct sim_pair *pair)
{
	struct tfd_conn *conn;

	connect_rails(&pair->a, 0, &pair->b, 0, &pair->out[0], &pair->in[0]);
	conn = sim_conn(&pair->a, pair->out[0]);
	conn->credits.limit = conn->credits.ask_at = UINT64_MAX;
}

/* So many targets, by the peers in turn. */
static void targets_open(uint32_t peers, uint32_t count)
{
	uint64_t out[PEERS_MAX];

	struct tfd_target *targets = sim_table(&world.pair.from);

	for (uint32_t i = 0; i < count; i++) {
		if (i < peers) {
			connect_unbounded(&world.pair);
			out[i] = world.pair.out[0];
		}
		world.pair.out[0] = out[i % peers];
		targets[i] = (struct tfd_target){ .dst_grant = sim_grant(&world.pair, &world.pair.from,
		                                                         &world.pair.to),
		                                  .src_offset = i * STRIDE,
		                                  .dst_offset = i * STRIDE,
		                                  .length = BYTES };
	}
}

static void world_open(const char *library, uint32_t peers, uint32_t posts)
{
	void *handle;
	void *symbol;

	CHECK(setenv("SOFTVERBS", "mode=null", 1) == 0);
	world.pair.paths = 1;
	host_open_on(&world.pair.a, library);
	host_open_on(&world.pair.b, library);
	handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
	CHECK(handle);
	symbol = dlsym(handle, "softverbs_counts");
	CHECK(symbol);
	memcpy(&world.counts, &symbol, sizeof(symbol));
	user_open(&world.pair.a, &world.pair.from);
	user_open(&world.pair.b, &world.pair.to);
	targets_open(peers, posts);
	world.worker = world.pair.a.core->groups[0]->worker;
	world.rail = &world.pair.a.core->groups[0]->rails[0];
	world.session = tfd_session_get(world.pair.a.core, world.pair.from.session);
}

static void world_close(void)
{
	tfd_session_put(world.session);
	sim_pair_close(&world.pair);
}

/* What the device was given. */
static uint64_t posted(void)
{
	struct softverbs_counts now;

	world.counts("soft0", &now);
	return now.posted;
}

/* From the ring to the last doorbell, as a pass does it. */
static __attribute__((noinline)) void cost_post(void)
{
	struct tfd_wc wc[1];

	(void)tfd_ring_drain(world.worker, world.session, &world.session->sources[0]);
	(void)tfd_conns_post(world.worker);
	(void)world.rail->ops->poll(world.rail->domain, wc, 0);
}

/* Until the job has ended. */
static __attribute__((noinline)) void cost_finish(const struct tfd_record *record, uint64_t job)
{
	while (tfd_load_acquire(&record->done_id) != job)
		(void)tfd_worker_poll_hot(world.worker);
}

static void run_worker(uint32_t posts, uint32_t rounds)
{
	struct tfd_entry entry = {
		.op = TFD_OP_SCATTER, .src_region = world.pair.from.region, .imm = 1, .table_count = posts
	};

	for (uint32_t i = 0; i <= rounds; i++) { /* the first one fills pools and caches */
		const struct tfd_record *record = user_submit(&world.pair.from, entry);
		uint64_t before = posted(), begin = clock_ns(), end;

		cost_post();
		end = clock_ns();
		CHECK(posted() == before + posts);
		if (i)
			(void)printf("%llu\n", (unsigned long long)(end - begin));
		cost_finish(record, world.pair.from.next_job);
		expect(record, TFD_JOB_OK, 0);
	}
}

/* The halves that the targets go by. */
static uint32_t halves(struct tfd_half **out)
{
	uint32_t count = 0;

	for (struct tfd_list *link = world.worker->conns.next; link != &world.worker->conns;
	     link = link->next)
		out[count++] = tfd_container(link, struct tfd_conn, link)->half;
	return count;
}

static __attribute__((noinline)) void cost_provider_post(struct tfd_half *const *half, uint32_t peers,
                                                         const struct tfd_post *post, struct tfd_wr *wrs,
                                                         uint32_t posts)
{
	const struct tfd_provider_ops *ops = world.rail->ops;
	struct tfd_wc wc[1];

	for (uint32_t i = 0, to = 0; i < posts; i++, to = to + 1 == peers ? 0 : to + 1)
		CHECK(ops->post(half[to], post, &wrs[i]) == 0);
	(void)ops->poll(world.rail->domain, wc, 0);
}

static __attribute__((noinline)) void cost_provider_finish(uint32_t posts)
{
	struct tfd_wc wc[PEERS_MAX];

	while (posts)
		posts -= (uint32_t)world.rail->ops->poll(world.rail->domain, wc, (int)PEERS_MAX);
}

static void run_provider(uint32_t posts, uint32_t rounds)
{
	struct tfd_half *half[PEERS_MAX];
	uint32_t peers = halves(half);
	struct tfd_wr wrs[PEERS_MAX];
	struct tfd_region_key key;
	struct tfd_mr *mr;
	struct tfd_post post = { .local = world.pair.from.memory, .length = BYTES, .has_imm = 1 };

	CHECK_OK(world.rail->ops->mr_open(world.rail->domain, world.pair.from.memory, REGION_BYTES, 1, &mr,
	                                  &key, &error));
	post.mr = mr;
	post.remote_address = key.address;
	post.remote_key = key.key;
	for (uint32_t i = 0; i <= rounds; i++) {
		uint64_t before = posted(), begin = clock_ns(), end;

		cost_provider_post(half, peers, &post, wrs, posts);
		end = clock_ns();
		CHECK(posted() == before + posts);
		if (i)
			(void)printf("%llu\n", (unsigned long long)(end - begin));
		cost_provider_finish(posts);
	}
	world.rail->ops->mr_close(world.rail->domain, mr);
}

/* What the provider has the device do, without the provider. */
static void ring_doorbell(struct ibv_qp_ex *ex)
{
	ibv_wr_start(ex);
	ex->wr_id = 1;
	ex->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_rdma_write_imm(ex, 1, 0, 0);
	ibv_wr_set_sge(ex, 1, 0, BYTES);
	CHECK(ibv_wr_complete(ex) == 0);
}

static void run_device(uint32_t posts, uint32_t rounds)
{
	struct tfd_half *half[PEERS_MAX];
	uint32_t peers = halves(half), back;
	struct ibv_wc wc[PEERS_MAX];

	for (uint32_t i = 0; i <= rounds; i++) {
		uint64_t begin = clock_ns(), end;

		for (uint32_t to = 0; to < posts; to++)
			ring_doorbell(half[to % peers]->queues[TFD_TRAFFIC_BULK].extended);
		end = clock_ns();
		if (i)
			(void)printf("%llu\n", (unsigned long long)(end - begin));
		for (back = 0; back < posts;)
			back += (uint32_t)ibv_poll_cq(world.rail->domain->send_cq, (int)PEERS_MAX, wc);
	}
}

static uint32_t number(const char *text, uint32_t most)
{
	unsigned long value = strtoul(text, NULL, 10);

	CHECK(value > 0 && value <= most);
	return (uint32_t)value;
}

int main(int words, char **word)
{
	uint32_t peers, posts, rounds;

	CHECK(words == 6 || !"LIBRARY worker|provider|device PEERS POSTS ROUNDS");
	posts = number(word[4], PEERS_MAX);
	peers = number(word[3], posts);
	rounds = number(word[5], UINT32_MAX - 1);
	world_open(word[1], peers, posts);
	if (strcmp(word[2], "worker") == 0)
		run_worker(posts, rounds);
	else if (strcmp(word[2], "provider") == 0)
		run_provider(posts, rounds);
	else if (strcmp(word[2], "device") == 0)
		run_device(posts, rounds);
	else
		CHECK(!"worker, provider or device");
	world_close();
	return 0;
}
