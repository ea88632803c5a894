/* SPDX-License-Identifier: Apache-2.0 */
/* Handles: never the same twice, never valid after removal, garbage never found. */
#include "core/table.h"
#include "core_fixture.h"

int main(void)
{
	struct tfd_table table = { 0 };
	uint64_t handles[100], again;
	int items[100];

	CHECK(!tfd_table_get(&table, 0) && !tfd_table_get(&table, UINT64_MAX) && !tfd_table_get(&table, 1));
	for (int round = 0; round < 50; round++) {
		for (int i = 0; i < 100; i++)
			CHECK_OK(tfd_table_add(&table, &items[i], &handles[i]));
		for (int i = 0; i < 100; i++)
			CHECK(tfd_table_get(&table, handles[i]) == &items[i]);
		CHECK(tfd_table_remove(&table, handles[50]) == &items[50]);
		CHECK(!tfd_table_remove(&table, handles[50]) && !tfd_table_get(&table, handles[50]));
		CHECK_OK(tfd_table_add(&table, &items[50], &again));
		CHECK(again != handles[50] && !tfd_table_get(&table, handles[50]));
		CHECK(tfd_table_remove(&table, again) == &items[50]);
		for (int i = 0; i < 100; i++)
			CHECK(i == 50 || tfd_table_remove(&table, handles[i]) == &items[i]);
		CHECK(table.count == 0);
	}
	tfd_table_fini(&table);
	return 0;
}
