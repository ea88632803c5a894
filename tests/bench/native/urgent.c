/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a small urgent write waits for on a fast rail, in simulated time: both workers are stepped every 250 ns, so that windows, turns and the
 * rail are what takes time, and no processor is. Nothing moves.
 *
 *   urgent idle GBPS DELAY_US COUNT      ns from a write's submission until its count is seen, of each of so many
 *   urgent beside GBPS DELAY_US COUNT    the same beside a session that floods; then bulk's rate without and with them, in Gbit/s
 */
#include "tests/sim_pair.h"

#define STEP_NS 250u
#define URGENT_BYTES 4096u
#define BULK_BYTES (1u << 20)
#define BULK_JOBS 16u
#define PAUSE_NS 200000u
#define SETTLE_NS 50000000u

struct scene {
	struct sim_pair pair;
	struct user bulk;
	uint64_t done;
	bool floods;
};

static void step(struct scene *scene)
{
	struct user *user = &scene->bulk;

	while (scene->floods && scene->done < user->next_job &&
	       tfd_load_acquire(&user->records[(scene->done + 1) % 64].done_id) == scene->done + 1)
		scene->done++;
	while (scene->floods && user->next_job - scene->done < BULK_JOBS)
		(void)user_submit(user, (struct tfd_entry){ .op = TFD_OP_WRITE,
		                                            .src_region = user->region,
		                                            .dst_grant = user->grant,
		                                            .length = BULK_BYTES,
		                                            .imm = 2 });
	sim_step(&scene->pair, STEP_NS);
}

static uint64_t sent(const struct scene *scene)
{
	struct tfd_session_info info;

	CHECK_OK(tfd_session_stat(scene->pair.a.core, scene->bulk.session, &info));
	return info.bytes_sent;
}

static void pass(struct scene *scene, uint64_t ns)
{
	for (uint64_t end = scene->pair.now + ns; scene->pair.now < end;)
		step(scene);
}

static double gbps_over(struct scene *scene, uint64_t bytes, uint64_t ns)
{
	return (double)(sent(scene) - bytes) * 8 / (double)ns;
}

int main(int argc, char **argv)
{
	static struct scene scene;
	char fabric[TFD_NAME_MAX];
	uint64_t value = 0;
	uint64_t begin;
	uint64_t before;
	double alone;

	if (argc != 5)
		return 2;
	(void)snprintf(fabric, sizeof(fabric), "move=0,rate_gbps=%s,delay_us=%s", argv[2], argv[3]);
	sim_pair_open(&scene.pair, 1, fabric, (struct tfd_group_options){ 0 });
	user_open(&scene.pair.a, &scene.bulk);
	scene.bulk.grant = sim_grant(&scene.pair, &scene.bulk, &scene.pair.to);
	scene.floods = strcmp(argv[1], "beside") == 0;
	pass(&scene, SETTLE_NS); /* the window finds what the rail carries */
	before = sent(&scene);
	pass(&scene, SETTLE_NS);
	alone = gbps_over(&scene, before, SETTLE_NS);
	before = sent(&scene);
	begin = scene.pair.now;
	for (uint64_t i = strtoull(argv[4], NULL, 10); i; i--) {
		uint64_t called = scene.pair.now;

		(void)user_submit(&scene.pair.from, (struct tfd_entry){ .op = TFD_OP_WRITE,
		                                                        .priority = TFD_PRIORITY_LATENCY,
		                                                        .src_region = scene.pair.from.region,
		                                                        .dst_grant = scene.pair.grant,
		                                                        .length = URGENT_BYTES,
		                                                        .imm = 1 });
		for (value++; scene.pair.to.counters[1].value < value;)
			step(&scene);
		(void)printf("%llu\n", (unsigned long long)(scene.pair.now - called));
		pass(&scene, PAUSE_NS + called % 7 * STEP_NS);
	}
	if (scene.floods)
		(void)printf("%.2f\n%.2f\n", alone, gbps_over(&scene, before, scene.pair.now - begin));
	user_unmap(&scene.bulk);
	sim_pair_close(&scene.pair);
	return 0;
}
