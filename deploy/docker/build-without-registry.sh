#!/bin/sh
# Builds an image where neither Docker's daemon nor a registry of images is to be had: as root on Debian, with
#   apt-get install buildah debootstrap
#   sh deploy/docker/build-without-registry.sh serve|train [more options of `buildah bud`]
# A minimal Debian with its own Python stands in for the official image, so this shows that the Dockerfile builds and
# that what it makes runs; it is not the image to ship. Packages come from Debian and from pip's index. Then, for example:
#   c=$(buildah from --pull-never localhost/tanuki-serve)
#   buildah run -v $PWD/data/registry:/registry:ro $c -- /opt/tanuki/bin/python -m deploy.serving --registry /registry
set -eu
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
cd "$(dirname "$0")/../.."
IMAGE=${1:?serve or train}
shift
FILE=deploy/docker/Dockerfile.$IMAGE
BASE=$(sed -n 's/^FROM \([^ ]*\)$/\1/p' $FILE)
SUITE=$(. /etc/os-release && echo "$VERSION_CODENAME")
ROOT=$(mktemp -d)
trap 'rm -rf "$ROOT"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$SUITE" "$ROOT"
ln -sf python3 "$ROOT/usr/bin/python"
rm -rf "$ROOT"/var/cache/apt/archives/*.deb
container=$(buildah from scratch)
buildah copy --quiet "$container" "$ROOT" /
buildah commit --quiet "$container" "localhost/$BASE"
buildah rm "$container"
buildah bud --pull-never "$@" -f $FILE -t tanuki-$IMAGE .
