//! Cases with stock Linux kernels.
//!
//! A guest's script prints what it finds as lines that begin with `@@`; the
//! demands are on those lines.

mod ballooned;
mod bridged;
mod consoles;
mod cycles;
mod driven;
mod handled;
mod moved;
mod network;
mod ps2;
mod recorded;
mod restored;
mod saved;
mod screen;
mod secured;
mod shared;
mod socketed;
mod struck;

use crate::case::{Action, Boot, Case, Fill, Form, Want};

const MIB: u64 = 1 << 20;

/// What must be true of every boot.
const BOOTED: &str = r#"
echo "@@ release=$(uname -r)"
echo "@@ cpus=$(nproc)"
echo "@@ online=$(cat /sys/devices/system/cpu/online)"
echo "@@ ids=$(grep '^apicid' /proc/cpuinfo | sort -u | wc -l)"
echo "@@ siblings=$(grep '^siblings' /proc/cpuinfo | sort -u | sed 's/.*: //')"
echo "@@ cores=$(grep '^core id' /proc/cpuinfo | sort -u | wc -l)"
echo "@@ clocks=$(cat /sys/devices/system/clocksource/clocksource0/available_clocksource)"
dmesg > /tmp/dmesg
grep -E 'BUG:|WARNING: CPU|Oops|Call Trace|unchecked MSR|soft lockup|rcu:.*stall|mce:.*error' /tmp/dmesg |
    sed 's/^/@@ bad: /'
grep -E 'ACPI (BIOS )?(Error|Warning|Exception)|pci .*(conflict|failed to assign|can.t claim)' /tmp/dmesg |
    sed 's/^/@@ bad: /'
echo "@@ hypervisor=$(grep -c 'Hypervisor detected: KVM' /tmp/dmesg)"
echo "@@ x2apic=$(grep -c '^flags.*x2apic' /proc/cpuinfo)"
"#;

const DEVICES: &str = r#"
for device in /sys/bus/pci/devices/*; do
    echo "@@ pci $(cat "$device/vendor") $(cat "$device/device") $(cat "$device/class")"
done
echo "@@ uart=$(cat /sys/class/tty/ttyS0/port)"
echo "@@ rtc=$(cut -d' ' -f1 < /sys/class/rtc/rtc0/name)"
now=$(date +%s); clock=$(cat /sys/class/rtc/rtc0/since_epoch)
[ $((now - clock)) -le 5 ] && [ $((clock - now)) -le 5 ] && echo '@@ rtc agrees'
echo "@@ serio=$(ls /sys/bus/serio/devices | wc -l)"
echo "@@ hwrng=$(cat /sys/class/misc/hw_random/rng_current | cut -d. -f1)"
echo "@@ random=$(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)"
echo "@@ sizes=$(cat /sys/block/vda/size) $(cat /sys/block/vdb/size)"
echo "@@ serials=$(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)"
echo "@@ readonly=$(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro)"
echo "@@ queues=$(ls /sys/block/vda/mq | wc -l) $(ls /sys/block/vdb/mq | wc -l)"
dd if=/dev/zero of=/dev/vdb count=1 2>/dev/null && echo '@@ wrote to a read-only disk'
echo "@@ msix=$(grep -c virtio /proc/interrupts)"
grep virtio /proc/interrupts | grep -qv MSI && echo '@@ virtio without MSI'
[ -e /sys/devices/virtual/misc ] && ls -d /sys/bus/*/drivers/pvpanic*/*:* /sys/bus/*/drivers/pvpanic*/QEMU* 2>/dev/null |
    grep -q . && echo '@@ pvpanic'
ls -d /sys/bus/*/drivers/vmgenid/*:* 2>/dev/null | grep -q . && echo '@@ generation id'
for name in /sys/class/input/input*/name; do echo "@@ input $(cat "$name")"; done
"#;

/// Copies vdb to vda in four parallel streams of different block sizes, and
/// checks it from the disk.
const STRESS: &str = r#"
stream() {
    dd if=/dev/vdb of=/dev/vda bs="$2" skip=$(($1 * 8388608 / $2)) seek=$(($1 * 8388608 / $2)) \
        count=$((8388608 / $2)) $3 conv=fsync 2>/dev/null || echo "@@ stream $1 failed"
}
stream 0 4096 & stream 1 16384 oflag=direct & stream 2 131072 & stream 3 1048576 oflag=direct &
wait
sync
echo 3 > /proc/sys/vm/drop_caches
sum() { dd if="/dev/$1" bs="$3" skip=$(($2 * 8388608 / $3)) count=$((8388608 / $3)) $4 2>/dev/null | md5sum; }
for n in 0 1 2 3; do
    (sum vdb $n 1048576 iflag=direct > /tmp/want.$n) &
    (sum vda $n 65536 > /tmp/got.$n) &
done
wait
for n in 0 1 2 3; do
    cmp /tmp/want.$n /tmp/got.$n && [ -s /tmp/got.$n ] && echo "@@ stream $n ok"
done
dmesg | grep -E 'I/O error|blk_update_request' | sed 's/^/@@ bad: /'
"#;

const DISCARD: &str = r#"
echo "@@ discard=$([ "$(cat /sys/block/vda/queue/discard_max_bytes)" -gt 0 ] && echo yes)"
echo "@@ zeroes=$([ "$(cat /sys/block/vda/queue/write_zeroes_max_bytes)" -gt 0 ] && echo yes)"
echo "@@ cache=$(cat /sys/block/vda/queue/write_cache)"
dd if=/dev/vda bs=1M count=1 2>/dev/null | cmp -s - /dev/zero
blkdiscard -o 0 -l 4194304 /dev/vda && echo '@@ discarded'
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda bs=1M count=4 2>/dev/null | md5sum | cut -c1-32 > /tmp/got
dd if=/dev/zero bs=1M count=4 2>/dev/null | md5sum | cut -c1-32 > /tmp/want
cmp /tmp/want /tmp/got && echo '@@ reads as zero'
dd if=/dev/urandom of=/dev/vda bs=4096 count=1 conv=fsync 2>/dev/null && echo '@@ flushed'
"#;

/// Makes a file system and fills it, tells when it is on the disk, and goes on writing
/// until it is killed; in its second life it looks whether all is there.
const FILE_SYSTEM: &str = r#"
mkdir -p /mnt
if mount -t ext4 /dev/vda /mnt 2>/dev/null; then
    cd /mnt && md5sum -c sums > /tmp/checked
    echo "@@ second life: $(grep -c ': OK' /tmp/checked) of $(wc -l < sums) files whole"
    cd / && umount /mnt
else
    mke2fs /dev/vda > /tmp/mke2fs 2>&1 && mount -t ext4 /dev/vda /mnt
    for n in 1 2 3 4 5 6 7 8 9 10 11 12; do
        dd if=/dev/urandom of=/mnt/file$n bs=40000 count=$n 2>/dev/null
    done
    for n in 2 4 6 8; do
        dd if=/dev/urandom of=/mnt/file$n bs=777 seek=$n count=9 conv=notrunc 2>/dev/null
    done
    rm /mnt/file3 /mnt/file9
    (cd /mnt && md5sum file* > sums)
    # Without a journal the first one flushes the disk before it writes the metadata.
    sync
    sync
    echo '@@ synced'
    while :; do
        dd if=/dev/urandom of=/mnt/junk bs=4096 count=300 conv=notrunc 2>/dev/null
        cp /mnt/file12 /mnt/more && rm /mnt/more
    done
fi
"#;

const IDENTITY: &str = r#"
cd /sys/class/dmi/id
for name in sys_vendor product_name product_version product_serial product_uuid product_sku \
    product_family chassis_asset_tag bios_vendor; do
    echo "@@ $name=$(cat $name)"
done
dmesg | grep -o 'SMBIOS [0-9.]* present' | sed 's/^/@@ /'
# Between texts there are bytes that are none.
tr -c '\040-\176' '\n' < /sys/firmware/dmi/tables/DMI | grep -x 'firststring\|secondstring' | sed 's/^/@@ oem /'
"#;

const FEATURES: &str = r#"
for name in popcnt cx16 xsave avx2 bmi2 aes sha_ni; do
    echo "@@ $name=$(grep -cw "^flags.*$name" /proc/cpuinfo)"
done
"#;

const REBOOT: &str = r#"
if dd if=/dev/vda bs=512 count=1 2>/dev/null | grep -q second; then
    echo "@@ second boot, $(nproc) CPUs"
else
    echo second | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
    echo '@@ first boot'
    drain
    reboot -f
fi
"#;

const BUTTON: &str = r#"
for name in /sys/class/input/input*/name; do
    [ "$(cat "$name")" = 'Power Button' ] || continue
    button=$(basename "$(dirname "$name")"/event*)
done
echo "@@ button is $button"
# The reader must have the device open before the button is pressed.
exec 3< "/dev/input/$button"
echo '@@ ready'
dd bs=24 count=1 <&3 2>/dev/null | wc -c | sed 's/^/@@ event of /'
"#;

const MEMORY: &str = r#"
total=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
[ "$total" -ge 3300 ] && [ "$total" -le 3584 ] && echo '@@ all memory is there'
grep -c 'System RAM' /proc/iomem | sed 's/^/@@ ranges=/'
grep -q '^ *100000000-.* : System RAM' /proc/iomem && echo '@@ memory above 4 GiB'
grep 'PCI ECAM\|PCI MMCONFIG' /proc/iomem | head -n 1
"#;

/// What is run in a guest by `make run` when nobody is there to type.
pub const TOUR: &str = r#"
uname -a
grep -m1 'model name' /proc/cpuinfo
echo "CPUs: $(nproc)"
echo "Memory: $(awk '/MemTotal/ { print int($2 / 1024) " MiB" }' /proc/meminfo)"
echo "PCI devices (address vendor device class):"
for device in /sys/bus/pci/devices/*; do
    echo "  ${device##*/} $(cat "$device/vendor") $(cat "$device/device") $(cat "$device/class")"
done
disks=$(ls /sys/block | grep vd | tr '\n' ' ')
echo "Disks: ${disks:-none (vireo run --disk adds one)}"
"#;

/// Starts the watchdog and feeds it no more; in its second life it tells why it lives.
const WATCHDOG: &str = r#"
if [ "$(cat /sys/class/watchdog/watchdog0/bootstatus)" = 32 ]; then
    echo '@@ second life: the watchdog ran out'
else
    echo "@@ first life: $(cat /sys/class/watchdog/watchdog0/identity)"
    watchdog -F -T 2 -t 1000 /dev/watchdog
fi
"#;

/// The cases of `make test` for a kernel, such as `6.12-cloud`.
#[must_use]
pub fn cases(kernel: &str) -> Vec<Case> {
    let mut cases = vec![
        boots(kernel, Form::Pvh, 1),
        boots(kernel, Form::Elf64, 2),
        boots(kernel, Form::BzImage, 4),
        devices(kernel, 2),
        stress(kernel, "", 2),
        discard(kernel),
        reboots(kernel, Form::BzImage, 2),
        panics(kernel),
        button(kernel),
        large_memory(kernel),
        shared_memory(kernel),
        identity(kernel),
    ];
    // Others lack the driver.
    if kernel == "6.12-cloud" {
        cases.push(watchdog(kernel));
        cases.push(recorded::sees_the_machine_of_record(kernel));
        cases.push(handled::typed_at_and_resized(kernel));
        cases.push(shared::has_directories(kernel));
        cases.push(saved::goes_on(kernel));
        // The nested machine has its modules too.
        cases.push(bridged::share_a_bridge(kernel));
        cases.push(socketed::talks_with_socat(kernel));
    }
    // The others have their file systems as modules.
    if kernel.ends_with("cloud") {
        cases.push(killed(kernel, ""));
        cases.push(driven::whole_life(kernel));
        cases.push(consoles::all(kernel));
        cases.push(network::reaches_its_host(kernel));
    }
    // One generic kernel's driver of the screen is enough.
    if kernel.ends_with("cloud") || kernel == "6.12-generic" {
        cases.push(screen::first_message(kernel));
        cases.push(ps2::keyboard_and_mouse(kernel));
    }
    cases
}

/// The further cases of `make test-full`.
#[must_use]
pub fn more_cases(kernel: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    for form in [Form::BzImage, Form::Pvh, Form::Elf64] {
        for cpus in [1, 2, 4] {
            cases.push(boots(kernel, form, cpus));
        }
    }
    cases.push(boots(kernel, Form::Pvh, 8));
    if kernel.starts_with("6.12") {
        cases.push(moved::goes_to_and_fro(kernel));
        cases.push(moved::goes_with_the_kernels_card(kernel));
        cases.push(secured::goes_over_tls(kernel));
        cases.push(struck::survives_cuts_and_kills(kernel));
    }
    for (word, cpus) in [
        ("cache=none", 2),
        ("cache=writethrough", 1),
        ("cache=directsync", 1),
        ("cache=unsafe", 2),
        ("aio=threads", 4),
        ("num_queues=4,queue_size=16", 4),
        ("num_queues=2,bw_size=16M,bw_refill_time=1000", 2),
    ] {
        cases.push(stress(kernel, word, cpus));
    }
    for words in [
        ",cluster_size=512",
        ",extended_l2=on,cluster_size=128k",
        ",refcount_bits=1",
    ] {
        cases.push(killed(kernel, words));
    }
    cases.push(reboots(kernel, Form::Pvh, 4));
    cases.push(reboots(kernel, Form::Elf64, 1));
    cases.push(huge_pages(kernel));
    cases.push(baseline(kernel, "x86-64-v2", 0));
    cases.push(baseline(kernel, "x86-64-v3", 2));
    cases.push(ballooned::gives(kernel));
    cases.push(ballooned::takes(kernel));
    cases.push(ballooned::huge(kernel));
    cases.push(restored::devices_go_on(kernel));
    cases.push(cycles::again_and_again(kernel));
    cases
}

/// The guest of `make run` without a terminal.
#[must_use]
pub fn tour(kernel: &str) -> Case {
    Case::new("tour", Boot::linux(kernel, Form::Pvh, TOUR)).args("--cpus boot=2 --rng")
}

/// The guest of `make run` with one: a shell.
#[must_use]
pub fn shell(kernel: &str) -> Case {
    Case::new("shell", Boot::linux(kernel, Form::Pvh, "")).args("--cpus boot=2 --rng")
}

fn case(kernel: &str, form: Form, name: &str, script: &str) -> Case {
    Case::new(
        format!("{kernel}/{name}"),
        Boot::linux(kernel, form, script),
    )
    .lines(["@@ up", "@@ end"])
    .want(Want::NoText("@@ bad".to_owned()))
    .want(Want::NoText("@@ insmod".to_owned()))
    .want(Want::NoText("Kernel panic".to_owned()))
}

fn boots(kernel: &str, form: Form, cpus: u32) -> Case {
    let online = if cpus == 1 {
        "0".to_owned()
    } else {
        format!("0-{}", cpus - 1)
    };
    let series = kernel.split('-').next().unwrap_or(kernel);
    case(
        kernel,
        form,
        &format!("boots-{}-{cpus}-cpus", form.word()),
        BOOTED,
    )
    .args(&format!("--cpus boot={cpus} --rng"))
    .lines([
        format!("@@ cpus={cpus}"),
        format!("@@ online={online}"),
        format!("@@ ids={cpus}"),
        format!("@@ siblings={cpus}"),
        format!("@@ cores={cpus}"),
        format!("@@ x2apic={cpus}"),
        "@@ hypervisor=1".to_owned(),
    ])
    .want(Want::Text(format!("@@ release={series}.")))
    .want(Want::Text("kvm-clock".to_owned()))
}

fn devices(kernel: &str, cpus: u32) -> Case {
    // The driver came between.
    let generation = kernel.starts_with("6.12").then_some("@@ generation id");
    case(kernel, Form::BzImage, "sees-every-device", DEVICES)
        .args(&format!("--cpus boot={cpus} --rng"))
        .args("--disk path={dir}/one,serial=first,num_queues=2")
        .args("--disk path={dir}/two,serial=second,readonly=on,num_queues=1")
        .file("one", 8 * MIB, Fill::Zero)
        .file("two", 3 * MIB + 512, Fill::Noise)
        .lines([
            "@@ uart=0x3F8",
            "@@ rtc=rtc_cmos",
            "@@ rtc agrees",
            "@@ hwrng=virtio_rng",
            "@@ random=64",
            "@@ sizes=16384 6145",
            "@@ serials=first second",
            "@@ readonly=0 1",
            "@@ queues=2 1",
            "@@ pvpanic",
            "@@ input Power Button",
            "@@ input AT Translated Set 2 keyboard",
        ])
        .lines(generation)
        // Host bridge, then two virtio-blk and one virtio-rng.
        .want(Want::Text(" 0x060000".to_owned()))
        .want(Want::Times("@@ pci 0x1af4 0x1042".to_owned(), 2))
        .want(Want::Times("@@ pci 0x1af4 0x1044".to_owned(), 1))
        .want(Want::NoText("@@ wrote".to_owned()))
        .want(Want::NoText("without MSI".to_owned()))
        .after("test $(stat -c %s two) = 3146240")
}

/// What the machine says of itself in SMBIOS.
fn identity(kernel: &str) -> Case {
    const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";
    case(kernel, Form::BzImage, "tells-who-it-is", IDENTITY)
        .args(&format!(
            "--smbios manufacturer=Maker,product=P-1,version=v2,serial=S.3,uuid={UUID}"
        ))
        .args("--smbios sku=k4,family=f5,asset_tag=t6,oem_string=firststring")
        .args("--smbios oem_string=secondstring")
        .lines([
            "@@ sys_vendor=Maker",
            "@@ product_name=P-1",
            "@@ product_version=v2",
            "@@ product_serial=S.3",
            "@@ product_sku=k4",
            "@@ product_family=f5",
            "@@ chassis_asset_tag=t6",
            "@@ bios_vendor=Vireo",
            "@@ SMBIOS 3.0.0 present",
            "@@ oem firststring",
            "@@ oem secondstring",
        ])
        .lines([format!("@@ product_uuid={UUID}")])
}

/// The features of two CPUs of a level; `third` have those of x86-64-v3.
fn baseline(kernel: &str, level: &str, third: u32) -> Case {
    let name = format!("cpu-baseline-{level}");
    case(kernel, Form::BzImage, &name, FEATURES)
        .args(&format!("--cpus boot=2,baseline={level}"))
        .lines(["@@ popcnt=2", "@@ cx16=2", "@@ aes=0", "@@ sha_ni=0"])
        .lines(["xsave", "avx2", "bmi2"].map(|name| format!("@@ {name}={third}")))
}

fn stress(kernel: &str, words: &str, cpus: u32) -> Case {
    let (name, words) = if words.is_empty() {
        ("disk-stress".to_owned(), String::new())
    } else {
        (
            format!("disk-stress-{}", words.replace([',', '='], "-")),
            format!(",{words}"),
        )
    };
    case(kernel, Form::Pvh, &name, STRESS)
        .args(&format!(
            "--cpus boot={cpus} --disk path={{dir}}/target{words}"
        ))
        .args("--disk path={dir}/source,readonly=on")
        .file("source", 32 * MIB, Fill::Noise)
        .file("target", 32 * MIB, Fill::Zero)
        .lines((0..4).map(|n| format!("@@ stream {n} ok")))
        .after("cmp source target && echo the files agree")
        .lines(["the files agree"])
        .limit(180)
}

/// A file system on a qcow2 image whose monitor is killed while the guest writes.
fn killed(kernel: &str, options: &str) -> Case {
    let words = options.replace([',', '='], "-");
    let name = format!("qcow2-survives-a-kill{words}");
    case(kernel, Form::Pvh, &name, FILE_SYSTEM)
        .before(&format!(
            "\"$VIREO\" image create -q -f qcow2 -o compat=1.1{options} disk 48M"
        ))
        .args("--cpus boot=2 --disk path={dir}/disk,format=qcow2")
        .step("@@ synced", Action::Signal("KILL".to_owned()))
        .exits(137)
        .after(
            "\"$VIREO\" image check -f qcow2 disk || test $? = 3
            sh again < /dev/null
            \"$VIREO\" image check -f qcow2 disk || test $? = 3",
        )
        .lines(["@@ second life: 10 of 10 files whole"])
        .limit(180)
}

fn discard(kernel: &str) -> Case {
    case(kernel, Form::Pvh, "discard-and-flush", DISCARD)
        .args("--disk path={dir}/disk")
        .file("disk", 8 * MIB, Fill::Noise)
        .lines([
            "@@ discard=yes",
            "@@ zeroes=yes",
            "@@ cache=write back",
            "@@ discarded",
            "@@ reads as zero",
            "@@ flushed",
        ])
        // 8 MiB less the 4 discarded, of which one block was written again.
        .after("used=$(du -k disk | cut -f1); test $used -ge 4096 -a $used -le 5120")
}

fn reboots(kernel: &str, form: Form, cpus: u32) -> Case {
    case(
        kernel,
        form,
        &format!("reboots-in-place-{}-{cpus}-cpus", form.word()),
        REBOOT,
    )
    .args(&format!("--cpus boot={cpus} --disk path={{dir}}/disk"))
    .file("disk", MIB, Fill::Zero)
    .lines([
        "@@ first boot".to_owned(),
        format!("@@ second boot, {cpus} CPUs"),
    ])
    .want(Want::Times("@@ first boot".to_owned(), 1))
}

fn watchdog(kernel: &str) -> Case {
    case(kernel, Form::Pvh, "watchdog-restarts", WATCHDOG)
        .args("--watchdog on")
        .lines([
            "@@ first life: i6300ESB timer",
            "@@ second life: the watchdog ran out",
        ])
}

fn panics(kernel: &str) -> Case {
    let script = "echo '@@ crashing'; drain; echo c > /proc/sysrq-trigger";
    let mut case = case(kernel, Form::Pvh, "panic-exits-with-3", script).exits(3);
    case.wants = Vec::new();
    case.lines(["@@ crashing"])
}

fn button(kernel: &str) -> Case {
    case(
        kernel,
        Form::BzImage,
        "sigterm-presses-the-power-button",
        BUTTON,
    )
    .step("@@ ready", Action::Signal("TERM".to_owned()))
    .lines(["@@ event of 24"])
    .args("--shutdown-timeout 60")
}

fn large_memory(kernel: &str) -> Case {
    case(
        kernel,
        Form::BzImage,
        "memory-continues-above-the-hole",
        MEMORY,
    )
    .args("--memory size=3584M")
    .lines(["@@ all memory is there", "@@ memory above 4 GiB"])
}

fn shared_memory(kernel: &str) -> Case {
    case(
        kernel,
        Form::Pvh,
        "shared-memory",
        "echo \"@@ cpus=$(nproc)\"",
    )
    .args("--memory size=256M,shared=on,prefault=on")
    .lines(["@@ cpus=1"])
}

fn huge_pages(kernel: &str) -> Case {
    let mut case = case(kernel, Form::Pvh, "huge-pages", "echo \"@@ cpus=$(nproc)\"")
        .before("echo 160 > /proc/sys/vm/nr_hugepages; grep -q 160 /proc/sys/vm/nr_hugepages")
        .args("--memory size=256M,hugepages=on")
        .lines(["@@ cpus=1"])
        .after("echo 0 > /proc/sys/vm/nr_hugepages");
    case.nested_only = true;
    case
}
