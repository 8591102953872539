"""Rows of channels as vectors, for the compiled loops of the CPU path, in LLVM's own terms.

The compiler cannot prove that two rows do not overlap and leaves loops over their channels scalar. Halves are widened
in registers: uint16 holds bfloat16, int16 holds float16.

Numba keeps compiled loops on disk until their own file changes: touch ``cpu_loops.py`` when this one does.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

_I32 = ir.IntType(32)
_WIDTHS = 32, 16, 8, 1  # channels at a time, as many as are left
_SUM = ("contract", "nsz", "reassoc")  # any order; never nnan or ninf: NaN and infinity are data


def _wide(context, array):
    """The type that is computed in, and its bytes."""
    return context.get_data_type(array.dtype), array.dtype.bitwidth // 8


def _at(builder, data, index, width):
    vector = ir.VectorType(data.type.pointee, width)
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _load(builder, dtype, data, index, width, wide):
    loaded = builder.load(_at(builder, data, index, width), align=dtype.bitwidth // 8)
    if dtype == types.uint16:
        bits = builder.zext(loaded, ir.VectorType(_I32, width))
        bits = builder.shl(bits, ir.Constant(bits.type, [16] * width))
        return builder.bitcast(bits, ir.VectorType(wide, width))
    if dtype == types.int16:
        half = builder.bitcast(loaded, ir.VectorType(ir.HalfType(), width))
        return builder.fpext(half, ir.VectorType(wide, width))
    return loaded


def _spread(builder, scalar, width):
    vector = ir.VectorType(scalar.type, width)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, width), [0] * width))


def _data(context, builder, signature, arguments):
    """Arguments with arrays as pointers to their data."""
    return [
        context.make_array(kind)(context, builder, argument).data if isinstance(kind, types.Array) else argument
        for kind, argument in zip(signature.args, arguments, strict=True)
    ]


def _blocks(builder, channels):
    """Loops over the channels in blocks: how wide they are, and the first channel of one."""
    done = ir.Constant(channels.type, 0)
    for width in _WIDTHS:
        end = builder.and_(channels, ir.Constant(channels.type, -width))
        with cgutils.for_range_slice(builder, done, end, ir.Constant(channels.type, width)) as (channel, _):
            yield width, channel
        done = end


@intrinsic
def gather_rows(typing, out, at, value, places, factors, begin, end, channels):
    """Store the sum over i from begin to end of ``factors[i] * value[places[i]]`` at ``out[at]``."""

    def generate(context, builder, signature, arguments):
        out, at, value, places, factors, begin, end, channels = _data(context, builder, signature, arguments)
        wide, size = _wide(context, signature.args[0])
        totals = {w: cgutils.alloca_once(builder, ir.VectorType(wide, w)) for w in _WIDTHS}
        one, four, multiple = (ir.Constant(end.type, n) for n in (1, 4, -4))
        fours = builder.add(begin, builder.and_(builder.sub(end, begin), multiple))
        for width, channel in _blocks(builder, channels):
            total = totals[width]

            def add(i, so_far, channel=channel, width=width):
                place = builder.add(channel, builder.load(builder.gep(places, [i])))
                row = _load(builder, signature.args[2].dtype, value, place, width, wide)
                factor = _spread(builder, builder.load(builder.gep(factors, [i])), width)
                product = builder.fmul(row, factor, flags=_SUM)
                return product if so_far is None else builder.fadd(so_far, product, flags=_SUM)

            builder.store(ir.Constant(ir.VectorType(wide, width), [0.0] * width), total)
            with cgutils.for_range_slice(builder, begin, fours, four) as (i, _):
                part = None  # a sum of its own: the next four need not wait for it
                for step in range(4):
                    part = add(builder.add(i, ir.Constant(i.type, step)), part)
                builder.store(builder.fadd(builder.load(total), part, flags=("contract",)), total)
            with cgutils.for_range_slice(builder, fours, end, one) as (i, _):
                builder.store(add(i, builder.load(total)), total)
            builder.store(builder.load(total), _at(builder, out, builder.add(at, channel), width), align=size)
        return context.get_dummy_value()

    scalars = types.intp
    return types.void(out, scalars, value, places, factors, scalars, scalars, scalars), generate


@intrinsic
def prefetch_row(typing, value, place, channels):
    """Ask for the row ``value[place]`` before it is needed."""

    def generate(context, builder, signature, arguments):
        value, place, channels = _data(context, builder, signature, arguments)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        line = ir.Constant(channels.type, 64 * 8 // signature.args[0].dtype.bitwidth)
        hints = [ir.Constant(_I32, n) for n in (0, 3, 1)]  # to read, soon and often, data
        with cgutils.for_range_slice(builder, ir.Constant(channels.type, 0), channels, line) as (channel, _):
            address = builder.gep(value, [builder.add(place, channel)])
            builder.call(prefetch, [builder.bitcast(address, cgutils.voidptr_t), *hints])
        return context.get_dummy_value()

    return types.void(value, types.intp, types.intp), generate


@intrinsic
def dot_rows(typing, dots, grads, at, value, places, begin, end, channels):
    """Store the inner product of ``grads[at]`` and ``value[places[i]]`` in ``dots[i]``, i from begin to end."""

    def generate(context, builder, signature, arguments):
        dots, grads, at, value, places, begin, end, channels = _data(context, builder, signature, arguments)
        wide, size = _wide(context, signature.args[0])
        bytes_ = builder.mul(builder.sub(end, begin), ir.Constant(end.type, size))
        cgutils.memset(builder, builder.gep(dots, [begin]), bytes_, 0)
        for width, channel in _blocks(builder, channels):
            left = _load(builder, signature.args[1].dtype, grads, builder.add(at, channel), width, wide)
            reduce = ir.FunctionType(wide, [wide, left.type])
            name = f"llvm.vector.reduce.fadd.v{width}f{8 * size}"
            reduce = cgutils.get_or_insert_function(builder.module, reduce, name)
            with cgutils.for_range_slice(builder, begin, end, ir.Constant(end.type, 1)) as (i, _):
                place = builder.add(builder.load(builder.gep(places, [i])), channel)
                right = _load(builder, signature.args[3].dtype, value, place, width, wide)
                product, dot = builder.fmul(left, right, flags=_SUM), builder.gep(dots, [i])
                builder.store(builder.call(reduce, [builder.load(dot), product], fastmath=_SUM), dot)
        return context.get_dummy_value()

    scalars = types.intp
    return types.void(dots, grads, scalars, value, places, scalars, scalars, scalars), generate


@intrinsic
def scatter_rows(typing, sums, places, factors, begin, end, grads, at, channels):
    """Add ``factors[i] * grads[at]`` to ``sums[places[i]]``, i from begin to end."""

    def generate(context, builder, signature, arguments):
        sums, places, factors, begin, end, grads, at, channels = _data(context, builder, signature, arguments)
        wide, size = _wide(context, signature.args[0])
        dtype = signature.args[0].dtype
        for width, channel in _blocks(builder, channels):
            row = _load(builder, dtype, grads, builder.add(at, channel), width, wide)
            with cgutils.for_range_slice(builder, begin, end, ir.Constant(end.type, 1)) as (i, _):
                place = builder.add(builder.load(builder.gep(places, [i])), channel)
                factor = _spread(builder, builder.load(builder.gep(factors, [i])), width)
                total = _load(builder, dtype, sums, place, width, wide)
                total = builder.fadd(total, builder.fmul(row, factor, flags=_SUM), flags=_SUM)
                builder.store(total, _at(builder, sums, place, width), align=size)
        return context.get_dummy_value()

    scalars = types.intp
    return types.void(sums, places, factors, scalars, scalars, grads, scalars, scalars), generate


@intrinsic
def load(typing, array, index):
    """``array[index]`` of a flat array; Numba's own would look whether the index is negative."""

    def generate(context, builder, signature, arguments):
        array, index = _data(context, builder, signature, arguments)
        return builder.load(builder.gep(array, [index]))

    return array.dtype(array, types.intp), generate


@intrinsic
def store(typing, array, index, element):
    """``array[index] = element``, as ``load``."""

    def generate(context, builder, signature, arguments):
        array, index, element = _data(context, builder, signature, arguments)
        builder.store(element, builder.gep(array, [index]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), generate


@intrinsic
def flat_array(typing, address, length, element):
    """The flat array of ``length`` elements of the type of ``element`` that begins at an address."""

    def generate(context, builder, signature, arguments):
        address, length, _ = arguments
        array = context.make_array(signature.return_type)(context, builder)
        size = context.get_constant(types.intp, signature.return_type.dtype.bitwidth // 8)
        data = builder.inttoptr(address, context.get_data_type(signature.return_type.dtype).as_pointer())
        shape, strides = (cgutils.pack_array(builder, [n]) for n in (length, size))
        populate_array(array, data, shape, strides, size, None)
        return array._getvalue()

    return types.Array(element, 1, "C")(types.intp, types.intp, element), generate


@intrinsic
def take_one(typing, counter):
    """Add 1 to the first element of an array of integers that threads share; what it was before."""

    def generate(context, builder, signature, arguments):
        (counter,) = _data(context, builder, signature, arguments)
        return builder.atomic_rmw("add", counter, ir.Constant(counter.type.pointee, 1), "monotonic")

    return counter.dtype(counter), generate
