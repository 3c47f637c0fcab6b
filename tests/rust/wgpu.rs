//! The products of `tenpak::wgpu_gemm`, every layout of the table against weights that the core itself rebuilds.
//!
//! With the feature `gpu` an adapter is needed; Mesa's software renderer (Debian: mesa-vulkan-drivers) is one.

#[cfg(not(feature = "gpu"))]
#[test]
fn without_the_feature_the_names_exist_and_say_what_to_enable() {
    use tenpak::wgpu_gemm::{Context, G8GemmContext, Options, adapters, block_on};
    let results = [
        block_on(G8GemmContext::new()).map(drop),
        block_on(Context::new(Options::default())).map(drop),
        adapters().map(drop),
    ];
    for result in results {
        let error = result.expect_err("there are no kernels");
        assert_eq!(error.kind(), tenpak::Kind::Unsupported);
        assert!(error.to_string().contains("feature gpu"), "{error}");
    }
}

#[cfg(feature = "gpu")]
mod products {
    use tenpak::codec::{self, Codec, Layout};
    use tenpak::tensor::{Dtype, Encoding, Tensor};
    use tenpak::wgpu_gemm::{Context, G8GemmContext, Options, Precision, Weight, adapters, block_on};
    use tenpak::{Kind, runner};

    /// Numbers in -1..1 that are the same on every machine.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> f32 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }

        fn vec(&mut self, n: usize) -> Vec<f32> {
            (0..n).map(|_| self.next()).collect()
        }
    }

    /// A weight's parts, and what they stand for.
    struct Case {
        layout: &'static Layout,
        parts: Vec<Vec<u8>>,
        exponent: i32,
        rebuilt: Vec<f32>,
        rows: usize,
        cols: usize,
    }

    fn case(codec: &'static Codec, rows: usize, cols: usize, size: f32, random: &mut Random) -> Case {
        let weights: Vec<f32> = random.vec(rows * cols).iter().map(|w| w * size).collect();
        let shape = vec![rows, cols];
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let tensor =
            Tensor { shape: shape.clone(), encoding: Encoding::Plain(Dtype::F32), bytes: bytes.into() };
        let encoded = runner::encode(&tensor, 1, codec, None, false).expect("finite weights");
        let parts: Vec<&[u8]> = encoded.parts.iter().map(Vec::as_slice).collect();
        let exponent = encoded.outcome.exponent;
        let mut out = vec![0u8; 4 * weights.len()];
        runner::decode(codec, exponent, &shape, 1, &parts, Dtype::F32, &mut out).expect("its own parts");
        let rebuilt = out.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Case { layout: codec.layout, parts: encoded.parts, exponent, rebuilt, rows, cols }
    }

    impl Case {
        fn upload(&self, context: &Context) -> tenpak::Result<Weight> {
            let parts: Vec<&[u8]> = self.parts.iter().map(Vec::as_slice).collect();
            context.weight(self.layout, &parts, self.rows, self.cols, self.exponent)
        }

        /// The largest error of an output over what its terms add up to without their signs.
        fn error(&self, x: &[f32], y: &[f32]) -> f64 {
            let tokens = x.len() / self.cols.max(1);
            assert_eq!(y.len(), tokens * self.rows);
            let mut worst = 0f64;
            for (x, y) in x.chunks_exact(self.cols).zip(y.chunks_exact(self.rows)) {
                for (w, &y) in self.rebuilt.chunks_exact(self.cols).zip(y) {
                    let terms = || w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                    let (sum, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                    assert!(y.is_finite());
                    worst = worst.max((f64::from(y) - sum).abs() / size.max(1e-30));
                }
            }
            worst
        }
    }

    fn open(options: Options) -> Context {
        block_on(Context::new(options)).expect("an adapter; Debian's mesa-vulkan-drivers has one")
    }

    fn full() -> Options {
        Options { precision: Precision::Full, ..Options::default() }
    }

    /// One codec of each layout.
    fn layouts() -> impl Iterator<Item = &'static Codec> {
        let first = |c: &Codec| codec::ALL.iter().position(|d| std::ptr::eq(d.layout, c.layout));
        codec::ALL.iter().enumerate().filter(move |(i, c)| first(c) == Some(*i)).map(|(_, c)| c)
    }

    const FULL: f64 = 2e-6;
    const HALF: f64 = 2e-3;

    #[test]
    fn every_layout_gives_the_products_of_its_rebuilt_weights() {
        let mut random = Random(1);
        let (full, auto) = (open(full()), open(Options::default()));
        let plain =
            open(Options { without_subgroups: true, precision: Precision::Full, ..Options::default() });
        for codec in layouts() {
            // Sizes below and above those from which kernels are configured otherwise: few, so that a software renderer
            // need not compile many.
            for (rows, cols, tokens) in [
                (1, 1, 1),
                (5, 7, 70),
                (67, 131, 1),
                (64, 64, 17),
                (130, 300, 3),
                (33, 2309, 1),
                (33, 2309, 3),
                (67, 2309, 70),
            ] {
                let case = case(codec, rows, cols, 1.0, &mut random);
                let x = random.vec(tokens * cols);
                for (context, most) in [(&full, FULL), (&plain, FULL), (&auto, HALF)] {
                    let weight = case.upload(context).expect("it fits");
                    let y = block_on(context.matmul(&x, tokens, &weight)).expect("it runs");
                    let error = case.error(&x, &y);
                    assert!(error < most, "{} {rows}x{cols} M={tokens}: {error:e}", case.layout.name);
                }
            }
        }
    }

    #[test]
    fn workgroups_with_tables_compute_many_rows() {
        let mut random = Random(10);
        let context = open(full());
        for codec in layouts().filter(|codec| codec.layout.tables.is_some()) {
            // Subgroups that share rows, and workgroups that take more than one turn.
            for (rows, cols) in [(2101, 40), (33_001, 9)] {
                let case = case(codec, rows, cols, 1.0, &mut random);
                let weight = case.upload(&context).expect("it fits");
                for tokens in [1, 3] {
                    let x = random.vec(tokens * cols);
                    let y = block_on(context.matmul(&x, tokens, &weight)).expect("it runs");
                    assert!(case.error(&x, &y) < FULL, "{} {rows}x{cols} M={tokens}", case.layout.name);
                }
            }
        }
    }

    #[test]
    fn inputs_that_are_not_finite_make_no_numbers_of_their_token() {
        let mut random = Random(11);
        let context = open(full());
        for codec in layouts() {
            let case = case(codec, 6, 40, 1.0, &mut random);
            let weight = case.upload(&context).expect("it fits");
            for wrong in [f32::NAN, f32::INFINITY] {
                let mut x = random.vec(3 * 40);
                x[40 + 17] = wrong;
                let y = block_on(context.matmul(&x, 3, &weight)).expect("it runs");
                let finite: Vec<bool> = y.chunks_exact(6).map(|y| y.iter().all(|y| y.is_finite())).collect();
                assert_eq!(finite, [true, false, true], "{}", case.layout.name);
            }
        }
    }

    #[test]
    fn magnitudes_beyond_half_precision_stay_finite_and_exact() {
        let mut random = Random(2);
        let context = open(Options::default());
        for codec in layouts() {
            for (size, input) in [(1e-12, 1.0), (1e12, 1e-6), (1.0, 1e7), (1.0, 1e-9), (1e4, 1e4)] {
                let case = case(codec, 20, 96, size, &mut random);
                let weight = case.upload(&context).expect("it fits");
                for tokens in [1, 16] {
                    let x: Vec<f32> = random.vec(tokens * 96).iter().map(|x| x * input).collect();
                    let y = block_on(context.matmul(&x, tokens, &weight)).expect("it runs");
                    let error = case.error(&x, &y);
                    assert!(error < HALF, "{} {size:e} {input:e} M={tokens}: {error:e}", case.layout.name);
                }
            }
        }
    }

    #[test]
    fn a_weight_beyond_the_limit_of_bindings_is_cut_into_slabs() {
        let mut random = Random(3);
        for codec in layouts() {
            let case = case(codec, 203, 129, 1.0, &mut random);
            for (limit, least) in [(4096, 4), (8192, 2)] {
                let context = open(Options { binding_bytes: Some(limit), ..full() });
                let weight = case.upload(&context).expect("a slab fits");
                assert!(weight.slabs() >= least, "{} slabs of {} bytes", weight.slabs(), weight.bytes());
                // Tokens are cut, too.
                for tokens in [1, 4, 40] {
                    let x = random.vec(tokens * 129);
                    let y = block_on(context.matmul(&x, tokens, &weight)).expect("it runs");
                    assert!(case.error(&x, &y) < FULL);
                }
            }
        }
        let context = open(Options { binding_bytes: Some(256), ..full() });
        let error =
            case(codec::find("int8_sym_v1").expect("a codec"), 8, 999, 1.0, &mut random).upload(&context);
        assert_eq!(error.expect_err("no row fits").kind(), Kind::Unsupported);
    }

    #[test]
    fn a_batch_gives_what_single_products_give() {
        let mut random = Random(4);
        let context = open(full());
        let cases: Vec<Case> = layouts().map(|codec| case(codec, 37, 90, 1.0, &mut random)).collect();
        let weights: Vec<Weight> = cases.iter().map(|c| c.upload(&context).expect("it fits")).collect();
        let mut batch = context.batch();
        let mut alone = Vec::new();
        for (i, weight) in weights.iter().enumerate() {
            let x = random.vec((1 + 3 * i) * 90);
            batch.matmul(&x, 1 + 3 * i, weight).expect("it fits");
            alone.push(block_on(context.matmul(&x, 1 + 3 * i, weight)).expect("it runs"));
        }
        assert_eq!(block_on(batch.submit()).expect("it runs"), alone);
        assert!(block_on(context.batch().submit()).expect("nothing to do").is_empty());
    }

    #[test]
    fn the_short_way_takes_packed_groups_of_eight() {
        let mut random = Random(5);
        let (m, n, k) = (3, 10, 29);
        let case = case(codec::find("int4_g8_fp16_v1").expect("a codec"), n, k, 1.0, &mut random);
        let floats = |i: usize| -> Vec<f32> {
            case.parts[i].as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
        };
        let (scales, offsets, x) = (floats(1), floats(2), random.vec(m * k));
        let context = block_on(G8GemmContext::new()).expect("an adapter");
        let y = block_on(context.gemm(&x, &case.parts[0], &scales, &offsets, m, n, k)).expect("it runs");
        assert!(case.error(&x, &y) < FULL);
        let wrong = block_on(context.gemm(&x, &case.parts[0], &scales[1..], &offsets, m, n, k));
        assert_eq!(wrong.expect_err("a scale is missing").kind(), Kind::Usage);
        let scales = vec![1e6; scales.len()];
        let wrong = block_on(context.gemm(&x, &case.parts[0], &scales, &offsets, m, n, k));
        assert!(wrong.expect_err("no half is 1e6").to_string().contains("scales[0]"));
    }

    #[test]
    fn empty_sizes_give_empty_products_or_zeros() {
        let context = open(full());
        let mut random = Random(6);
        for codec in layouts() {
            for (rows, cols, tokens) in [(0, 8, 3), (4, 0, 3), (4, 8, 0)] {
                let case = case(codec, rows, cols, 1.0, &mut random);
                let weight = case.upload(&context).expect("nothing to upload");
                let y =
                    block_on(context.matmul(&vec![1.0; tokens * cols], tokens, &weight)).expect("it runs");
                assert_eq!(y, vec![0.0; tokens * rows]);
            }
        }
    }

    #[test]
    fn wrong_requests_are_errors() {
        let (context, other) = (open(full()), open(full()));
        let case = case(codec::find("int4_opt_v1").expect("a codec"), 8, 32, 1.0, &mut Random(7));
        let weight = case.upload(&context).expect("it fits");
        let kind = |result: tenpak::Result<Vec<f32>>| result.expect_err("a wrong request").kind();
        assert_eq!(kind(block_on(context.matmul(&[0.0; 31], 1, &weight))), Kind::Usage);
        assert_eq!(kind(block_on(context.matmul(&[0.0; 32], usize::MAX, &weight))), Kind::Usage);
        assert_eq!(kind(block_on(other.matmul(&[0.0; 32], 1, &weight))), Kind::Usage);
        let parts: Vec<&[u8]> = case.parts.iter().map(|p| &p[1..]).collect();
        assert_eq!(context.weight(case.layout, &parts, 8, 32, 0).expect_err("too short").kind(), Kind::Usage);
        let huge = context.weight(case.layout, &parts, usize::MAX, usize::MAX, 0);
        assert_eq!(huge.expect_err("too short").kind(), Kind::Usage);
        let parts: Vec<&[u8]> = case.parts.iter().map(Vec::as_slice).collect();
        let exponent = context.weight(case.layout, &parts, 8, 32, 1000);
        assert_eq!(exponent.expect_err("beyond FP32").kind(), Kind::Unsupported);
        let nobody = block_on(Context::new(Options { adapter: Some("no such GPU".into()), ..full() }));
        assert!(nobody.expect_err("no such GPU").to_string().contains("no such GPU"));
    }

    #[test]
    fn a_lost_device_is_an_error_from_then_on() {
        let context = open(full());
        let case = case(codec::find("int4_opt_v1").expect("a codec"), 8, 32, 1.0, &mut Random(8));
        let weight = case.upload(&context).expect("it fits");
        let mut batch = context.batch();
        batch.matmul(&[0.0; 32], 1, &weight).expect("it fits");
        context.close();
        for error in [
            block_on(batch.submit()).map(drop),
            block_on(context.matmul(&[0.0; 32], 1, &weight)).map(drop),
            case.upload(&context).map(drop),
        ] {
            let error = error.expect_err("the device is gone");
            assert_eq!(error.kind(), Kind::Io);
            assert!(error.to_string().contains("lost"), "{error}");
        }
    }

    #[test]
    fn adapters_can_be_named_and_timed() {
        let all = adapters().expect("this build has kernels");
        let context = open(Options { adapter: Some(all[0].name.to_uppercase()), ..full() });
        assert_eq!(context.adapter().name, all[0].name);
        let case = case(codec::find("int4_opt_v1").expect("a codec"), 64, 64, 1.0, &mut Random(9));
        let weight = case.upload(&context).expect("it fits");
        match block_on(context.time(&[&weight, &weight], 1, 3)) {
            Ok(seconds) => assert!(seconds.len() == 3 && seconds.iter().all(|s| (0.0..10.0).contains(s))),
            Err(error) => assert!(!context.adapter().timestamps, "{error}"),
        }
    }
}
