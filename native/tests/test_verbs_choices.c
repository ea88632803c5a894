/* SPDX-License-Identifier: Apache-2.0 */
/* Which device, port and GID the verbs provider takes, and what it says of it: on the double of libibverbs (softverbs/). */
#include "verbs_soft.h"

static int try_open(struct tfd_rail_info *info, const char *rail, struct tfd_verbs_options verbs)
{
	struct tfd_group_options options = rail_options();
	struct tfd_domain *domain = NULL;
	int rc;

	options.verbs = verbs;
	memset(info, 0, sizeof(*info));
	error.text[0] = 0;
	rc = ops->domain_open(&options, rail, info, &domain, &error);
	CHECK(!rc == !error.text[0] && !rc == (domain != NULL));
	ops->domain_close(domain);
	nothing_is_left();
	return rc;
}

static void test_gids(void)
{
	struct tfd_verbs_options none = { 0 }, link_local = { .link_local = 1 },
				 given = { .gid_given = 1, .gid_index = 0 };
	struct tfd_rail_info info;

	configure("gids=v1:ll,v2:ll");
	CHECK(try_open(&info, DEVICE, none) == -EADDRNOTAVAIL);
	CHECK(strstr(error.text, "link-local") && strstr(error.text, "gid_index"));
	CHECK_OK(try_open(&info, DEVICE, link_local));
	CHECK(strstr(info.why, "GID index 1") && strstr(info.why, "link-local as allowed"));
	CHECK_OK(try_open(&info, DEVICE, given));
	CHECK(strstr(info.why, "as configured") && strcmp(info.protocol, "verbs/roce1/1") == 0);
	configure("gids=v1:v4");
	CHECK(try_open(&info, DEVICE, link_local) == -EADDRNOTAVAIL);
	configure("gids=-,-");
	CHECK(try_open(&info, DEVICE, link_local) == -EADDRNOTAVAIL && strstr(error.text, "none"));
	configure("gids=v2:ll,-,v2:ula");
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "GID index 2") && strstr(info.why, "none is of an IPv4"));
	configure("gids=v2:ula,v2:ll,v2:v4");
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "GID index 2") && strstr(info.why, "IPv4"));
}

static void test_names(void)
{
	struct tfd_verbs_options none = { 0 }, second = { .port = 2 };
	struct tfd_rail_info info;

	configure("ports=2");
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "port 1"));
	CHECK_OK(try_open(&info, DEVICE ":2", none));
	CHECK(strstr(info.why, "port 2"));
	CHECK_OK(try_open(&info, DEVICE, second));
	CHECK(strstr(info.why, "port 2"));
	CHECK(try_open(&info, DEVICE ":3", none) == -ENODEV);
	CHECK_OK(try_open(&info, "10.2.0.2", none));
	CHECK(strstr(info.why, "soft1 port 2") && strstr(info.why, "10.2.0.2"));
	CHECK(try_open(&info, "10.3.0.2", none) == -ENODEV);
	SOFT(softverbs_port)(DEVICE, 1, 0);
	CHECK_OK(try_open(&info, DEVICE, none));
	CHECK(strstr(info.why, "port 2"));
	SOFT(softverbs_port)(DEVICE, 1, 1);
}

/* By its LID, and nothing of a GID. */
static void test_infiniband(void)
{
	struct joined pair;

	configure("link=ib; gids=ib:ll");
	side_open_at(&a, DEVICE);
	side_open_at(&b, "soft1");
	CHECK(strcmp(a.info.protocol, "verbs/ib/1") == 0);
	pair_open(&pair);
	write_passes(&pair, 3);
	pair_close(&pair);
	side_close(&a);
	side_close(&b);
	nothing_is_left();
}

static void test_too_small(void)
{
	struct tfd_rail_info info;

	configure("max_srq_wr=32");
	CHECK(try_open(&info, DEVICE, (struct tfd_verbs_options){ 0 }) == -ENOTSUP);
	CHECK(strstr(error.text, "shared receive queue"));
}

int main(void)
{
	(void)unsetenv("TFD_TEST_LIBRARY");
	(void)unsetenv("TFD_TEST_RAIL");
	test_gids();
	test_names();
	test_infiniband();
	test_too_small();
	return 0;
}
