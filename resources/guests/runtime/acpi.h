/* Finding ACPI tables: ACPI 6.4, 5.2.5 to 5.2.8. */
#ifndef ACPI_H
#define ACPI_H

#include "runtime.h"

struct acpi_table {
    char signature[4];
    uint32_t length;
    uint8_t revision, checksum;
    char oem[6], oem_table[8];
    uint32_t oem_revision, creator, creator_revision;
} __attribute__((packed));

/* The table with these four letters, or NULL; its checksum is right. */
const struct acpi_table *acpi_find(const char *signature);

#endif
