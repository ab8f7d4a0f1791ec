#include "acpi.h"

/* Offsets in the RSDP. */
#define RSDP_REVISION 15
#define RSDP_RSDT 16
#define RSDP_XSDT 24
#define RSDP_LENGTH 20

static bool sums_to_zero(uint64_t at, uint32_t length)
{
    uint8_t sum = 0;

    while (length--)
        sum += read8(at++);
    return sum == 0;
}

static uint64_t find_rsdp(void)
{
    if (boot.rsdp)
        return boot.rsdp;
    for (uint64_t at = ACPI_START; at < HIMEM_START; at += 16)
        if (memcmp((const void *)at, "RSD PTR ", 8) == 0 && sums_to_zero(at, RSDP_LENGTH))
            return at;
    return 0;
}

const struct acpi_table *acpi_find(const char *signature)
{
    uint64_t rsdp = find_rsdp();
    bool wide;
    const struct acpi_table *root;

    if (!rsdp || !sums_to_zero(rsdp, RSDP_LENGTH))
        return NULL;
    wide = read8(rsdp + RSDP_REVISION) >= 2 && read64(rsdp + RSDP_XSDT);
    root = (const void *)(wide ? read64(rsdp + RSDP_XSDT) : read32(rsdp + RSDP_RSDT));
    if (!map((uint64_t)root, sizeof(*root)))
        return NULL;
    for (uint64_t at = (uint64_t)(root + 1); at < (uint64_t)root + root->length; at += wide ? 8 : 4) {
        const struct acpi_table *table = (const void *)(wide ? read64(at) : read32(at));

        if (map((uint64_t)table, sizeof(*table)) && memcmp(table->signature, signature, 4) == 0)
            return sums_to_zero((uint64_t)table, table->length) ? table : NULL;
    }
    return NULL;
}
